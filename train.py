"""Train a LLaMA: `torchrun --nproc-per-node 8 train.py --config configs/llama_7b.yaml`.

Token shards and a configuration go in; checkpoints, metrics and a log come out in runs/<name>. The
same command again resumes. `build` makes everything a run needs, `step` does one optimizer step,
`train` is the loop: pretraining, fine-tuning, benchmarks and tests all use these three.
"""

from llama.runtime import signals

if __name__ == "__main__":
    # first of all: a signal that comes while torch is imported is heard too
    signals.listen()

import faulthandler
import gc
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from kernels import attention
from llama import cli, config, costs, faults, files, optim
from llama.cli import UserError, show_bytes, show_count
from llama.config import Config
from llama.convert.load import load_weights, recognise
from llama.data import loader, mixture, schedule, shards
from llama.doctor import refuse_clashes
from llama.model import Transformer
from llama.parallel import apply, fsdp, layout
from llama.plan import dry, layouts
from llama.runtime import console, folder, metrics, oom, profile, rerun, rewind, world
from llama.runtime.guard import Guard
from llama.runtime.state import State, Step, resume, save
from llama.runtime.watch import Watch

# by then neither compiling nor the first reads show in the speed
PLAN_AFTER_STEPS = 50
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -- one step --------------------------------------------------------------------------------------


def step(state: State, tokens: torch.Tensor, source: torch.Tensor) -> Step:
    """One optimizer step on this rank's windows: `tokens` (n, T+1) and their source index (n,).

    Nothing here waits for the device, unless `guard.rerun` is on. A non-finite loss or gradient on
    any rank, or a spike that is to be skipped, leaves parameters and moments of every rank as they
    are.
    """
    cfg = state.cfg
    compute = partial(gradients, state, tokens, source)
    stats, loss, factor = rerun.checked(state, compute) if cfg.guard.rerun else compute()
    state.saver.before_update()
    norm, found_inf = optim.step(
        state.optimizer,
        lr=optim.learning_rate(cfg.optim, state.step, state.steps),
        clip=cfg.optim.clip,
        grad_factor=factor,
        judge=partial(state.guard.judge, loss),
    )
    state.optimizer.zero_grad(set_to_none=True)
    state.window += torch.where(found_inf.bool(), 0.0, stats)
    state.step += 1
    return Step(loss, norm)


def gradients(
    state: State, tokens: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a step, left in the parameters, and what they are still to be multiplied with.

    Returns (sum of losses, targets) per source and the mean loss, over all ranks, then that factor.
    """
    cfg = state.cfg
    nominal = state.order.segment(state.step).batch_windows * cfg.data.seq_len
    stats = torch.zeros_like(state.window)
    here = (tensor.to(state.world.device, non_blocking=True) for tensor in (tokens, source))
    micro_batches = list(zip(*(t.split(state.micro_batch) for t in here), strict=True))
    for number, (windows, rows) in enumerate(micro_batches, 1):
        fsdp.prepare(state.model, cfg.parallel, last=number == len(micro_batches))
        with record_function("forward"):
            losses, counts = forward(state, windows)
        # FSDP averages over ranks: the constant makes that the mean over the batch's tokens
        with record_function("backward"):
            (losses.sum() * (state.averaged_over / nominal)).backward()
        if state.place.tensor_rank == 0:
            stats.index_add_(0, rows, torch.stack([losses.detach(), counts], dim=1).double())
    dist.all_reduce(stats)
    faults.point("step.graded", next(state.model.parameters()).grad, step=state.step + 1)
    loss_sum, valid = stats.sum(dim=0)
    # a batch may hold no target at all
    valid = valid.clamp(min=1)
    # masked targets make the mean one over fewer tokens than the constant assumed
    return stats, loss_sum / valid, nominal / valid


def forward(state: State, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of losses and number of targets per window of `tokens` (b, T+1)."""
    data = state.cfg.data
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    doc_ids = None
    if not data.attend_across_documents:
        doc_ids = loader.document_ids(inputs, state.eos_id)
    if not data.boundary_loss:
        targets = loader.drop_boundary_targets(inputs, targets, state.eos_id)
    part = state.place.part
    losses, counts = state.model(part(inputs), part(targets), doc_ids)
    return losses, counts


@torch.no_grad()
@record_function("validation")
def validate(state: State, watch: Watch, row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the mean loss per source over the first windows of its held-out documents.

    Cut short by a signal, nothing: the row is kept in the state, and finished by the next start.
    """
    cfg, here, place, results = state.cfg, state.world, state.place, {}
    assert isinstance(cfg.data.mixture, dict)
    state.model.eval()
    for name, source in state.valid.items():
        budget = max(int(cfg.validation.tokens * cfg.data.mixture[name]), cfg.data.seq_len)
        tokens = loader.validation_windows(source, cfg.data.seq_len, budget)
        total = torch.zeros(2, dtype=torch.float64, device=here.device)
        # every rank makes the same number of forward passes: FSDP gathers in each
        share = state.micro_batch * place.data_size
        for low in range(0, len(tokens), share):
            faults.point("step.validating", step=state.step)
            if watch.poll("validation") is None:
                break
            part = tokens[low : low + share][place.data_rank :: place.data_size]
            losses, counts = forward(state, (part if len(part) else tokens[:1]).to(here.device))
            if len(part) and place.tensor_rank == 0:
                total += torch.stack([losses.double().sum(), counts.double().sum()])
        dist.all_reduce(total)
        results[name] = float(total[0] / total[1])
    state.model.train()
    fsdp.reshard(state.model)
    # the last step's is not made up for: nothing starts after it
    state.unvalidated = row if watch.asked and state.step < state.steps else None
    if watch.asked:
        here.say(f"the validation of step {state.step} was cut short by {watch.asked}")
        return {} if state.unvalidated else row
    here.say(metrics.validation_line(state.step, results))
    return row | {f"val/{name}": loss for name, loss in results.items()}


# -- building a run --------------------------------------------------------------------------------


def build(cfg: Config, here: world.World, run: Path) -> State:
    """Open the data, build and shard the model, make the optimizer, plan the order."""
    sources = open_data(cfg)
    plan = schedule.plan(cfg, sources)
    place = fsdp.place(cfg.parallel, here.device.type)
    micro_batch = fitting_micro_batch(cfg, here)
    dtype = DTYPES.get(cfg.train.dtype)
    dtype = dtype or (torch.bfloat16 if here.device.type == "cuda" else torch.float32)
    asked = cfg.kernels.attention, here.device, dtype, cfg.model.head_dim
    with cli.as_user_error("this machine", ValueError):
        backend = attention.choose(*asked, cfg.kernels.deterministic)
    rerun.refuse(cfg, backend, here.device)
    with torch.device("meta"):
        model = Transformer(cfg.model, attention=backend)
    chosen = replace(cfg, train=replace(cfg.train, micro_batch=micro_batch))
    averaged_over = apply.apply(model, chosen, place, dtype)
    model.to_empty(device=here.device)
    model.init_weights(cfg.seed)
    # nothing draws from these yet; a checkpoint keeps them, so they begin where the seed says
    torch.manual_seed(cfg.seed)
    valid = shards.open_sources(cfg.data.path, list(sources), "valid")
    if cfg.train.init_from:
        recognise(cfg.train.init_from)  # refused here, before anything is written
    return State(
        cfg=cfg,
        world=here,
        run=run,
        model=model,
        optimizer=optim.build(model, cfg.optim),
        sources=sources,
        valid={name: s for name, s in valid.items() if s.n_windows(cfg.data.seq_len)},
        order=plan,
        steps=config.total_steps(cfg.train),
        place=place,
        averaged_over=averaged_over,
        micro_batch=micro_batch,
        dtype=dtype,
        backend=backend,
        window=torch.zeros(len(plan.names), 2, dtype=torch.float64, device=here.device),
        guard=Guard(cfg.guard, here),
    )


def open_data(cfg: Config) -> dict[str, shards.Source]:
    """Training shards of every source of the mixture; fills in `model.vocab_size`."""
    path = Path(cfg.data.path)
    if not path.is_dir():
        quickstart = path.parts[:2] == ("data", "quickstart")
        how = "make quickstart" if quickstart else "python -m llama.data.tokenize"
        raise UserError(f"data.path {path} does not exist: `{how}` makes it")
    sources = shards.open_sources(path, list(cfg.data.mixture), "train")
    pieces = next(iter(sources.values())).vocab_size
    if cfg.model.vocab_size not in (None, pieces):
        raise UserError(
            f"model.vocab_size is {cfg.model.vocab_size}, the shards in {path} were made with "
            f"a tokenizer of {pieces} pieces"
        )
    cfg.model.vocab_size = pieces
    return sources


def fitting_micro_batch(cfg: Config, here: world.World) -> int:
    """Windows per forward pass: what was asked for, else the most that is planned to fit."""
    on_gpu = here.device.type == "cuda"
    at = layout.resolve(cfg, here.size, on_gpu)
    if cfg.train.micro_batch != "auto":
        return at.micro_batch
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(here.device)
        return layouts.fitting(cfg, at, free, most=layout.share(cfg, at))
    # beyond this a CPU's caches gain nothing
    return layouts.fitting(cfg, at, math.inf, most=8192 // cfg.data.seq_len)


# -- the loop --------------------------------------------------------------------------------------


def train(cfg: Config) -> int:
    """Train until the last step or until asked to stop. Returns the exit code."""
    open_data(cfg)  # knows the vocabulary
    layouts.refuse(cfg, world.launched()[1], world.chip(world.own_device()))
    # until there is a watch; ends who hangs and who waits for it
    faulthandler.dump_traceback_later(cfg.train.save_timeout, file=2, exit=True)
    here = world.start()
    run = folder.RUNS / cfg.name
    with oom.explained("building the model", cfg, here):
        state = build(cfg, here, run)
    with folder.held(run, here):
        folder.check(run, cfg, here, costs.checkpoint_bytes(cfg.model))
        watch = Watch(state)
        # a signal that came while torch was imported and the model built
        watch.poll("loading")
        if not watch.asked:
            with oom.explained("loading the checkpoint", cfg, here, state):
                if not resume(state) and (path := cfg.train.init_from):
                    weights = dict(state.model.named_parameters())
                    here.say(load_weights(path, weights, here, state.tokenizer_sha256))
        folder.record(run, cfg, here)
        try:
            if not watch.asked:
                loop(state, watch)
        except Exception as error:
            error.add_note(f"on rank {here.rank} at step {state.step}")
            first = watch.failed(f"{type(error).__name__}: {error}")
            watch.beat("saving")
            # a save in flight may still become whole
            state.saver.finish(timeout_s=60)
            if not first:
                # this error is a consequence: the first rank has told its own
                sys.stdout.flush()
                signals.end(f"rank {here.rank} ends: another one has failed", 1)
            raise
        asked = watch.asked if state.step < state.steps else ""
        if here.leads:
            verdict = ("requeue", asked) if asked else ("done", "all steps are trained")
            folder.exit_reason(run, *verdict, state.step)
        here.largest(0)  # no rank ends before it stands there: schedulers then end the others
        if asked:
            here.say(f"stopped by {asked} at step {state.step}: the same command resumes")
    # torchrun takes any other code for a crash
    return cli.EXIT_REQUEUE if asked and not here.under_torchrun else 0


def loop(state: State, watch: Watch) -> None:
    """Steps until the end, or until asked to stop; saved then, where there is progress."""
    cfg, here = state.cfg, state.world
    log = None
    if here.leads:
        # a row that is to be made up for may be there already, by a start that saved nothing
        until = state.step - bool(state.unvalidated)
        log = metrics.Metrics(state.run, cfg.log, until, config.to_dict(cfg), state.guard.branch)
    console.announce(state)
    gc.collect()
    gc.disable()  # a collection in the middle of a step stalls every rank; done at log steps
    planned = layouts.expected(cfg, state.micro_batch, here.size, here.chip)
    settled = state.step + PLAN_AFTER_STEPS
    reader = loader.Loader(state.sources, state.order)
    reader.stalled_after_s = cfg.train.step_timeout
    clock = metrics.Clock(state.tokens)

    saved = state.step
    if state.unvalidated and (row := validate(state, watch, state.unvalidated)) and log:
        log.row(state.step, row)
    agree = partial(watch.poll, "waiting for data")
    batches = rewind.batches(state, reader, partial(rows_of, state), agree)
    for number, tokens, source in profile.recorded(batches, state, clock):
        assert number == state.step
        watch.beat("training")
        faults.point("step.begun", step=number + 1)
        with oom.explained(f"step {number + 1}", cfg, here, state):
            measured = step(state, tokens, source)
        if rewind.rewound(state):
            clock.read(state.tokens, reader.waited_s)
            saved = state.step
            continue
        last = state.step == state.steps
        stands, row = {"branch": state.guard.branch, "tokens": state.tokens}, {}
        if is_logged(state):
            row = console.log_row(state, measured, clock, reader.waited_s)
            if planned and state.step >= settled:
                here.say(console.beside_plan(planned, row))
                row, planned = row | planned, {}
            # what is new: all takes 0.1 s, for which the device waits
            gc.collect(1)
        if cfg.validation.every and (state.step % cfg.validation.every == 0 or last):
            with clock.paused(), oom.explained("validation", cfg, here, state):
                row = validate(state, watch, stands | row)
        if row and log:
            log.row(state.step, stands | row)
        if state.step % cfg.checkpoint.every == 0:
            watch.beat("saving")
            with clock.paused():
                saved = state.step if save(state, wait=False) else saved
                gc.collect()
    watch.beat("saving")
    state.saver.finish()
    if (saved != state.step or state.saver.problem) and not save(state):
        raise UserError(
            f"the last checkpoint, of step {state.step}, could not be written "
            f"({state.saver.problem}): mend that, the same command goes on from the newest"
        )
    state.recording.close()
    watch.beat("ending")
    reader.close()
    if log:
        log.close()


def rows_of(state: State, number: int) -> tuple[int, int]:
    """Which windows of a step's batch this process trains on: first and end."""
    place = state.place
    each = state.order.segment(number).batch_windows // place.data_size
    return place.data_rank * each, (place.data_rank + 1) * each


def is_logged(state: State) -> bool:
    """Whether the step just made has a row in metrics.jsonl."""
    return state.step % state.cfg.log.every == 0 or state.step in (1, state.steps)


# -- the command -----------------------------------------------------------------------------------


def dry_run(cfg: Config, gpus: int | None) -> None:
    """Build the model on the meta device and print what the run would be, and on so many GPUs what
    each would hold; nothing is written.
    """
    counts = None
    if Path(cfg.data.path).is_dir():
        counts = {name: source.n_tokens for name, source in open_data(cfg).items()}
    elif cfg.model.vocab_size is None:
        cfg.model.vocab_size = 32_000
        print("no shards yet: a vocabulary of 32,000 is assumed")
    with torch.device("meta"):
        model = Transformer(cfg.model, attention="reference")
    spread = f"\n\n{dry.spread(cfg, gpus)}" if gpus else ""
    causal, palm = costs.flops_per_token(cfg.model, cfg.data.seq_len)
    size, free = costs.checkpoint_bytes(cfg.model), files.free_bytes(folder.RUNS)
    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("FLOPs per token", f"{causal / 1e9:.2f} G (causal), {palm / 1e9:.2f} G (PaLM)"),
        ("FLOPs of the run", f"{causal * cfg.train.tokens:.3g}"),
        ("tokens", show_count(cfg.train.tokens)),
        ("steps", f"{config.total_steps(cfg.train):,} of {cfg.train.batch_tokens:,} tokens"),
        ("checkpoint", f"{show_bytes(size)}, {cfg.checkpoint.keep} kept"),
        ("free disk", show_bytes(free)),
    ]
    print(cli.table((cfg.name, ""), rows))
    print()
    assert isinstance(cfg.data.mixture, dict)
    print(mixture.plan_table(cfg.data.mixture, int(cfg.train.tokens), counts) + spread)


def main(argv: list[str]) -> int:
    """Parse, then train or describe. Under torchrun rank 0 tells a user's error for all."""
    parser = config.parser("torchrun train.py")
    parser.add_argument("--dry_run", action="store_true", help="Describe the run and stop.")
    parser.add_argument("--gpus", type=int | None, help="Of a dry run: spread it over so many.")
    argv = [re.sub(r"^--profile\b", "--log.profile", word) for word in argv]
    try:
        refuse_clashes()
        cfg = config.load(argv, parser)
        given = parser.parse_args(argv)
        if given.gpus is not None and (given.gpus < 1 or not given.dry_run):
            raise UserError(f"--gpus is {given.gpus}, expected 1 or more and --dry_run with it")
        if given.dry_run:
            dry_run(cfg, given.gpus)
            return 0
        return train(cfg)
    except UserError as error:
        # rank 0 tells for all; who runs out of memory or fails in the loop may be alone with it
        alone = isinstance(error, oom.OutOfMemory) or hasattr(error, "__notes__")
        if world.launched()[0] and not alone:
            sys.exit(cli.EXIT_USER)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        world.stop()


if __name__ == "__main__":
    cli.run(main)
