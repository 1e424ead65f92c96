"""Prometheus metrics: vLLM's names where it has them, `veriattn:` for what only a verifier has."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from veriattn.engine.strategies import ExecutorReport

_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """One registry per server. Every series has the label `model_name`, as vLLM's do."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self.running = self._gauge("vllm:num_requests_running", "Requests that the engine is computing.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait to be admitted.")
        self.kv_usage = self._gauge(
            "vllm:kv_cache_usage_perc", "Share of cache entries that admitted requests reserve, 0 to 1."
        )
        self.prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Prompt tokens of requests whose first token has been released."
        )
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens released.")
        self.success = self._counter("vllm:request_success", "Requests that ended well.", "finished_reason")
        self.ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "Time to the first released token.", _LATENCIES_S
        )
        self.inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between released tokens of a choice.", _LATENCIES_S
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Time from submission to end.", _LATENCIES_S)
        self.request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens released for a request.", _TOKENS
        )
        self.ready = self._gauge(
            "veriattn:ready", "1 if the tamper canary was caught and the prover is honest and alive."
        )
        self.alarm = self._gauge("veriattn:alarm", "1 from the first verification failure until the process ends.")
        self.rejects = self._counter(
            "veriattn:rejects", "Claims rejected, by error code; canaries not counted.", "code"
        )
        self.canaries = self._counter("veriattn:canaries", "Tamper canaries, by what became of them.", "outcome")
        self.prover_faults = self._counter("veriattn:prover_faults", "Provers lost, by error code.", "code")
        self.sessions = self._counter("veriattn:sessions", "Provers started.")
        self.retries = self._counter("veriattn:request_retries", "Requests computed again on a fresh prover.")
        self.failures = self._counter(
            "veriattn:request_failures", "Requests that ended with an error, by its code.", "code"
        )
        self.refused = self._counter(
            "veriattn:requests_refused", "Requests refused before they were queued, by code.", "code"
        )
        self.receipts = self._counter("veriattn:receipts", "Receipts issued.")
        self.steps = self._counter("veriattn:steps", "Steps checked in full.")
        self.checks = self._counter("veriattn:checks", "Rows checked.", "kind")
        self.bytes = self._counter("veriattn:prover_bytes", "Bytes over the link to the prover.", "direction")
        self.verify_cpu = self._counter("veriattn:verify_cpu_seconds", "CPU time of the verifier in steps.")
        self.prover_wait = self._counter("veriattn:prover_wait_seconds", "Time spent in receiving claims.")
        self.lag = self._histogram(
            "veriattn:verification_lag_seconds",
            "Wall time of a step that was not spent on receiving claims: what checking adds.",
            _STEP_S,
        )
        self._seen = ExecutorReport()

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge: Gauge = Gauge(name, text, ["model_name"], registry=self.registry).labels(self._model)
        return gauge

    def _counter(self, name: str, text: str, label: str | None = None) -> Counter:
        labels = ["model_name"] if label is None else ["model_name", label]
        counter: Counter = Counter(name, text, labels, registry=self.registry)
        return counter.labels(self._model) if label is None else counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
        bound: Histogram = histogram.labels(self._model)
        return bound

    def count(self, counter: Counter, label: str, amount: float = 1) -> None:
        """Add to a counter that has a label of its own."""
        counter.labels(self._model, label).inc(amount)

    def observe(self, report: ExecutorReport) -> None:
        """Take over the engine's totals."""
        last, self._seen = self._seen, report
        for kind in ("linear_rows", "attention_rows", "elementwise_replayed"):
            self.count(self.checks, kind, max(0, getattr(report, kind) - getattr(last, kind)))
        self.count(self.bytes, "to_prover", max(0, report.bytes_to_prover - last.bytes_to_prover))
        self.count(self.bytes, "from_prover", max(0, report.bytes_from_prover - last.bytes_from_prover))
        self.verify_cpu.inc(max(0.0, report.verify_cpu_s - last.verify_cpu_s))
        self.prover_wait.inc(max(0.0, report.prover_wait_s - last.prover_wait_s))

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
