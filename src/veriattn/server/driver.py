"""The thread that drives the engine: continuous batching of jobs, tamper canary, replacement of faulty provers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veriattn.engine.engine import Engine, Request, TokenOutput
from veriattn.errors import MalformedMessage, ProverFault, ProverUnavailable, VeriattnError, VerificationError
from veriattn.server.config import ProverSettings
from veriattn.server.errors import public_message
from veriattn.server.jobs import Event, Evidence, FailedEvent, Job, TokenEvent
from veriattn.server.metrics import Metrics
from veriattn.server.tamper import TamperSwitch

State = Literal["starting", "ready", "recovering", "failing", "broken", "stopped"]

log = logging.getLogger("veriattn.server.engine")

_IDLE_CHECK_S = 1.0
_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Condition:
    """What /ready says. canary: `caught`, `missed`, `pending`, or `not-applicable` where nothing is outsourced."""

    state: State
    canary: str
    honest_request: bool
    last_fault: str | None


@dataclass(frozen=True)
class _Command:
    kind: Literal["submit", "cancel", "abort", "stop"]
    job: Job | None = None
    error: VeriattnError | None = None


def is_lie(error: VeriattnError) -> bool:
    """Whether the prover was caught, as opposed to dead or silent."""
    return isinstance(error, VerificationError | MalformedMessage)


class EngineDriver:
    """Owns the engine. Public methods may be called from any thread; everything else runs on the driver's own.

    Faults: a prover that is caught lying ends the jobs that it was caught lying about (`FailedEvent`; all of its step where the
    claim does not tell). The others of the step, and those of a prover that died or fell silent, are computed again on its
    successor, `request_retries` times at most. Tokens that were released stay released, since they were checked; nothing of
    a faulty step is.

    Ready means: the canary was caught, and the current prover has passed the checks of an honest step.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ProverSettings,
        metrics: Metrics,
        switch: TamperSwitch,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._settings, self._metrics, self._switch = engine, settings, metrics, switch
        self._on_death = on_death
        self._commands: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="veriattn-engine")
        self._stopping = False
        self._state: State = "starting"
        self._canary = "pending"
        self._honest = False
        self._last_fault: str | None = None
        self._jobs: dict[int, Job] = {}  # by engine request id
        self._faults = 0
        self._steps_since_fault = 0
        self._retry_at = 0.0
        self._demo_liar: Job | None = None  # whose switch was thrown in this step
        self.lag_s = 0.0

    # -- any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job whose requests have been checked against the engine's limits."""
        self._post(_Command("submit", job))

    def cancel(self, job: Job) -> None:
        """Forget a job. Its client is gone, or its time is up."""
        self._post(_Command("cancel", job))

    def abort_all(self, error: VeriattnError) -> None:
        """End every job with this error."""
        self._post(_Command("abort", error=error))

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread and its prover. A step in progress is given up after a second."""
        self._stopping = True
        self._post(_Command("stop"))
        self._thread.join(1.0)
        if self._thread.is_alive():
            session = getattr(self._engine.executor, "session", None)
            if session is not None:
                session.channel.abort()
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def condition(self) -> Condition:
        return Condition(self._state, self._canary, self._honest, self._last_fault)

    @property
    def ready(self) -> bool:
        return self._state == "ready" and self.alive

    @property
    def accepting(self) -> bool:
        """Whether new jobs have a prospect: a prover that is being replaced is no reason to refuse."""
        return self._state in ("ready", "recovering") and self.alive

    def _post(self, command: _Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # -- the loop ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._state == "broken":
                    continue
                if self._state != "ready":
                    if time.monotonic() >= self._retry_at:
                        self._bring_up()
                elif self._engine.has_work:
                    self._step()
                elif self._prover_is_gone():
                    self._fault(ProverUnavailable("the prover ended while it was idle"))
        finally:
            # Reached in good order or by a bug: nobody may be left waiting.
            self._set_state("stopped")
            self._fail_all(ProverUnavailable("the server is shutting down"))
            self._engine.close()
            if not self._stopping:
                log.critical("the engine's thread has ended")
                self._on_death()

    def _take_commands(self) -> bool:
        """Carry out what was asked for; waits while there is nothing else to do. False to stop."""
        with self._wake:
            if not self._commands and (wait_s := self._idle_s()) > 0:
                self._wake.wait(wait_s)
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            if command.kind == "stop":
                return False
            self._carry_out(command)
        if commands:
            self._gauge_load()
        return True

    def _idle_s(self) -> float:
        if self._state == "ready":
            return 0.0 if self._engine.has_work else _IDLE_CHECK_S
        return _IDLE_CHECK_S if self._state == "broken" else self._retry_at - time.monotonic()

    def _carry_out(self, command: _Command) -> None:
        if command.kind == "submit" and command.job is not None:
            self._admit(command.job)
        elif command.kind == "cancel" and command.job is not None:
            self._drop(command.job)
        elif command.kind == "abort" and command.error is not None:
            self._fail_all(command.error)

    def _admit(self, job: Job) -> None:
        if self._state not in ("ready", "recovering"):
            self._deliver([(job, FailedEvent(ProverUnavailable("no prover passes the checks at present")))])
            return
        try:
            for index, request in enumerate(job.requests):
                request_id = self._engine.submit(request)
                job.choice_of[request_id] = index
                self._jobs[request_id] = job
            job.open_choices = len(job.requests)
        except VeriattnError as e:
            self._drop(job)
            self._deliver([(job, FailedEvent(e))])

    def _drop(self, job: Job) -> None:
        for request_id in job.choice_of:
            if self._jobs.pop(request_id, None) is not None:
                self._engine.forget(request_id)
        job.choice_of.clear()

    # -- steps -------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One step and the delivery of its tokens. False after a fault."""
        self._arm_for_demo()
        before, started = self._engine.report(), time.monotonic()
        try:
            outputs = self._engine.step()
        except VeriattnError as e:
            self._fault(e)
            return False
        wall_s, after = time.monotonic() - started, self._engine.report()
        self.lag_s = max(0.0, wall_s - (after.prover_wait_s - before.prover_wait_s))
        self._metrics.lag.observe(self.lag_s)
        self._metrics.steps.inc()
        self._metrics.observe(after)
        self._steps_since_fault += 1
        if self._steps_since_fault >= self._settings.healthy_steps:
            self._faults = 0
        self._release(outputs)
        self._gauge_load()
        return True

    def _session_evidence(self) -> Evidence:
        executor = self._engine.executor
        # The session may have ended in freeing a sequence after the step, whose tokens were checked all the same.
        report = self._engine.report() if executor is None else executor.report()
        return Evidence(report.checks(), report.soundness_bits)

    def _release(self, outputs: list[TokenOutput]) -> None:
        evidence = self._session_evidence()
        now, events = time.monotonic(), list[tuple[Job, Event]]()
        for output in outputs:
            job = self._jobs[output.request_id]
            choice = job.choice_of[output.request_id]
            self._measure(job, choice, now)
            if output.finish_reason is not None:
                self._jobs.pop(output.request_id)
                self._engine.forget(output.request_id)
                job.open_choices -= 1
                self._metrics.count(self._metrics.success, output.finish_reason)
                if job.open_choices == 0:
                    self._faults = 0
                    self._metrics.e2e.observe(now - job.submitted)
                    self._metrics.request_generation_tokens.observe(job.released)
            events.append((job, TokenEvent(choice, output, self.lag_s, evidence)))
        self._metrics.generation_tokens.inc(len(outputs))
        self._deliver(events)

    def _measure(self, job: Job, choice: int, now: float) -> None:
        job.released += 1
        if job.first_token is None:
            job.first_token = now
            self._metrics.ttft.observe(now - job.submitted)
            self._metrics.prompt_tokens.inc(job.prompt_tokens)
            self._metrics.request_prompt_tokens.observe(job.prompt_tokens)
        if choice in job.last_token:
            self._metrics.inter_token.observe(now - job.last_token[choice])
        job.last_token[choice] = now

    def _arm_for_demo(self) -> None:
        self._demo_liar = None
        for job in self._jobs.values():
            if job.lie_after is not None and job.released >= job.lie_after:
                job.lie_after, self._demo_liar = None, job
                self._switch.arm(self._random_claim())

    def _random_claim(self) -> int:
        # Four linears a layer, at least, are claimed in every step of every strategy.
        return secrets.randbelow(4 * self._engine.model.manifest.config.num_layers)

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Event]]] = {}
        for job, event in events:
            by_loop.setdefault(job.loop, []).append((job, event))
        for loop, batch in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_hand_over, batch)

    def _gauge_load(self) -> None:
        running, waiting, reserved = self._engine.load()
        self._metrics.running.set(running)
        self._metrics.waiting.set(waiting)
        self._metrics.kv_usage.set(reserved / self._engine.config.kv_tokens)

    # -- bringing a prover up ----------------------------------------------------------------------------------

    def _bring_up(self) -> None:
        """Canary (once), then a session that passes an honest step: of the jobs at hand, or of a probe."""
        try:
            if self._canary == "pending" and not self._run_canary():
                return
            self._engine.start()
            self._metrics.sessions.inc()
            if not self._engine.has_work:
                self._probe()
        except VeriattnError as e:
            self._fault(e)
            return
        if self._engine.has_work and not self._step():
            return
        self._honest = True
        self._set_state("ready")

    def _run_canary(self) -> bool:
        """Alter one claim of the real prover; the verifier must object. Raises: VeriattnError for other faults."""
        if self._engine.guarantee != "exact":
            self._canary = "not-applicable"
            return True
        self._switch.arm(self._random_claim())
        try:
            self._probe()
        except VerificationError as e:
            if self._switch.armed:
                raise  # a lie of the prover's own: ours was not told yet, and nobody knows whether it would be caught
            self._canary = "caught"
            self._metrics.count(self._metrics.canaries, "caught")
            log.info("the tamper canary was caught", extra={"fault": e.message, "code": e.code})
            return True
        finally:
            self._switch.disarm()
            self._engine.reset()
        self._canary = "missed"
        self._metrics.count(self._metrics.canaries, "missed")
        self._metrics.alarm.set(1)
        self._set_state("broken")
        log.critical("the verifier accepted an altered claim; this server will not become ready")
        return False

    def _probe(self) -> None:
        """A short request of our own. Raises: VeriattnError."""
        vocab = self._engine.model.manifest.config.vocab_size
        prompt = tuple(secrets.randbelow(vocab) for _ in range(4))
        request_id = self._engine.submit(Request(prompt, max_tokens=_PROBE_TOKENS, ignore_eos=True))
        try:
            self._engine.run_all()
        finally:
            self._engine.forget(request_id)

    def _prover_is_gone(self) -> bool:
        executor = self._engine.executor
        pid = None if executor is None else executor.report().prover_pid
        return pid is not None and not Path(f"/proc/{pid}").exists()

    # -- faults ------------------------------------------------------------------------------------------------

    def _fault(self, error: VeriattnError) -> None:
        """The session has ended. Decide who pays, and when to try again."""
        in_step = [self._jobs[i] for i in self._engine.step_ids if i in self._jobs]
        victims = self._victims(error, in_step)
        self._engine.step_ids, self._demo_liar = (), None
        if self._engine.executor is not None:
            self._engine.reset()
        self._metrics.observe(self._engine.report())
        self._last_fault = f"{error.code}: {public_message(error)}"
        lie = is_lie(error)
        log.log(
            logging.CRITICAL if lie else logging.ERROR,
            "the prover was caught" if lie else "the prover failed",
            extra={
                "code": error.code,
                "fault": error.message,
                "hint": error.hint,
                "jobs_in_step": len(set(in_step)),
                "jobs_concerned": len(set(victims)),
            },
        )
        if lie:
            self._metrics.count(self._metrics.rejects, error.code)
            self._metrics.alarm.set(1)
        elif isinstance(error, ProverFault):
            self._metrics.count(self._metrics.prover_faults, error.code)
        for job in dict.fromkeys(in_step):
            if job not in victims and job.retries < self._settings.request_retries:
                job.retries += 1
                self._metrics.retries.inc()
            else:
                self._fail(job, error)
        self._faults += 1
        self._steps_since_fault = 0
        self._schedule_retry()
        self._gauge_load()

    def _victims(self, error: VeriattnError, in_step: list[Job]) -> list[Job]:
        """Jobs that end with this error. The rest are safe to run again: a lie about one row is none about another, and every
        claim is checked anew in a session with other secrets."""
        if not isinstance(error, ProverFault):
            return in_step
        if not is_lie(error):
            return []
        if self._demo_liar is not None:
            return [self._demo_liar]
        named = error.sequences if isinstance(error, VerificationError) else frozenset()
        return [self._jobs[i] for i in self._engine.step_ids if i in named and i in self._jobs] or in_step

    def _schedule_retry(self) -> None:
        s = self._settings
        # The first replacement is immediate: one fault is bad luck or an attack, not yet a pattern.
        delay_s = 0.0 if self._faults <= 1 else min(s.max_backoff_s, s.first_backoff_s * 2.0 ** (self._faults - 2))
        self._retry_at = time.monotonic() + delay_s
        if self._faults > s.max_restarts:
            self._fail_all(ProverUnavailable("the prover keeps failing"))
            self._set_state("failing")
        else:
            self._set_state("starting" if self._state == "starting" else "recovering")

    def _fail(self, job: Job, error: VeriattnError) -> None:
        self._drop(job)
        self._metrics.count(self._metrics.failures, error.code)
        self._deliver([(job, FailedEvent(error))])

    def _fail_all(self, error: VeriattnError) -> None:
        for job in dict.fromkeys(self._jobs.values()):
            self._fail(job, error)
        with self._wake:
            late = (
                [c.job for c in self._commands if c.kind == "submit" and c.job is not None]
                if self._state == "stopped"
                else []
            )
        self._deliver([(job, FailedEvent(error)) for job in late])

    def _set_state(self, state: State) -> None:
        if state != self._state:
            log.info("state", extra={"state": state})
        self._state = state
        self._metrics.ready.set(1 if state == "ready" else 0)


def _hand_over(batch: list[tuple[Job, Event]]) -> None:
    for job, event in batch:
        job.events.put_nowait(event)
