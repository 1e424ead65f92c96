"""`generate`: verified generation for one prompt or a file of them, shown as it is released."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_args

import click

from veriattn.cli.floatmode import CHECK_OPTIONS, check_options, generate_float
from veriattn.cli.inputs import check_digest, check_writable, model_option, prover_words, refuse_given, threads_option
from veriattn.cli.output import (
    UNVERIFIED_MARK,
    Interrupted,
    Progress,
    TextStream,
    error_json,
    json_option,
    note,
    print_error,
    print_json,
)
from veriattn.cli.receipt import need_packages, write_local_receipt
from veriattn.cli.report import generation_json, in_words
from veriattn.convert.pull import PUBLISHED
from veriattn.engine.engine import Engine, EngineConfig, Request, RequestState, TokenOutput
from veriattn.engine.strategies import STRATEGIES, Strategy
from veriattn.errors import ModelError, UsageError, VeriattnError
from veriattn.home import models_directory, resolve_model
from veriattn.native import set_threads
from veriattn.shield.permutation import ShieldMode
from veriattn.spec.modelfile import WEIGHTS_FILE
from veriattn.spec.sampler import SamplingParams
from veriattn.trace import table
from veriattn.verifier.tiling import Tiling
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import AttentionCheck

_CHECKS: dict[str, AttentionCheck | Literal["auto"]] = {
    "auto": "auto",
    "replay": AttentionCheck.REPLAY,
    "transfer": AttentionCheck.TRANSFER,
}
_MAX_PROMPTS_BYTES = 256 << 20


@click.command()
@model_option
@click.argument("prompt", required=False)
@click.option("--prompts-file", type=click.Path(path_type=Path), metavar="FILE",
              help="Many prompts at once: each line a JSON string or plain text.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens of an answer."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, default=0, help="Only the K most likely tokens.  [default: off]")
@click.option("--top-p", type=float, default=1.0, help="Only the most likely that add up to P.  [default: off]")
@click.option(
    "--min-p", type=float, default=0.0, help="Only those at least P times as likely as the first.  [default: off]"
)
@click.option("--repetition-penalty", type=float, default=1.0, help="Divides logits of tokens seen.  [default: off]")
@click.option("--presence-penalty", type=float, default=0.0, help="Lowers logits of tokens used.  [default: off]")
@click.option("--frequency-penalty", type=float, default=0.0, help="The same, per use.  [default: off]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampler: same seed, same answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option(
    "--logprobs", type=click.IntRange(0, 100), metavar="N", help="Log-probabilities with the N most likely, in JSON."
)
@click.option("--strategy", type=click.Choice(STRATEGIES), default="run-ahead", show_default=True,
              help="Where the work is done. All give the same tokens.")  # fmt: skip
@click.option("--attention-check", type=click.Choice(sorted(_CHECKS)), default="replay", show_default=True,
              help="Recompute attention scores, or have them sent and check those; auto measures.")  # fmt: skip
@click.option(
    "--prefill-chunk", type=click.IntRange(1, 1 << 16), default=512, show_default=True, help="Most tokens of one step."
)
@click.option(
    "--tiles",
    metavar="HEADS,ROWS|auto|off",
    help="Pipeline of `veriattn`: head blocks and row tiles; `auto` measures.  [default: by length]",
)
@click.option("--kv-shield", type=click.Choice(get_args(ShieldMode)), default="off", show_default=True,
              help="Scramble the keys and values that the prover sees (veriattn, tsdp).")  # fmt: skip
@click.option("--shield-first-layers", type=click.IntRange(min=0), default=0, metavar="N",
              help="Keep attention of the first N layers in the TEE.  [default: 0]")  # fmt: skip
@click.option("--prover-kv-tokens", type=click.IntRange(min=0), metavar="C",
              help="Keys of one sequence that the prover keeps; the TEE keeps the others.  [default: all]")  # fmt: skip
@click.option("--prover-kv-total", type=click.IntRange(min=0), metavar="C",
              help="Keys of all sequences that the prover keeps, first come, first served.  [default: all]")  # fmt: skip
@click.option("--offload-ratio", type=click.FloatRange(0, 1), metavar="P",
              help="Part of the other keys that is streamed to the prover in each step.  [default: adapts]")  # fmt: skip
@click.option("--tee-memory", metavar="SIZE",
              help="Most memory for keys and values in the TEE, for example 512M or 4G.  [default: no limit]")  # fmt: skip
@click.option("--emulate-link", metavar="GBPS[,LATENCY_US]", help="Slow the link to the prover down, for measuring.")
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write a Chrome/Perfetto trace of both sides."
)
@click.option(
    "--prover-address",
    metavar="ADDRESS",
    help="A prover that listens: tcp://HOST:PORT, vsock://CID:PORT, unix:///PATH.",
)
@click.option("--prover-command", metavar="CMD", help="Another program as the prover (docs/wire.md).")
@click.option(
    "--digest",
    callback=check_digest,
    metavar="SHA256",
    help="Refuse a model of another digest.  [default: pinned for pulled names]",
)
@click.option("--receipt", "receipt_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write a signed receipt, to be checked or replayed (`veriattn receipt`).")  # fmt: skip
@click.option("--numerics", type=click.Choice(["exact", "float"]), default="exact", show_default=True,
              help="float: the paper's system, checked within a tolerance (docs/paper-mode.md).")  # fmt: skip
@check_options
@threads_option
@json_option
def generate(model: str, prompt: str | None, prompts_file: Path | None, as_json: bool, **options: Any) -> int:
    """Answer a prompt; every token has been checked when it appears.

    Greedy, with the model's chat template, unless told otherwise. PROMPT may be - for standard input. With --json the text
    goes to standard error as it is released, and standard output gets one JSON object. Ctrl-C keeps what was verified.

    \b
    Example:
      veriattn generate -m smollm2 "Why is the sky blue?" --max-tokens 64
      veriattn generate -m smollm2 --temperature 0.8 --top-p 0.95 --seed 7 "Write a haiku."
      veriattn generate -m smollm2 --prompts-file prompts.txt --json
    """
    prompts = _prompts(prompt, prompts_file, raw=options["raw"])
    if options["receipt_file"] is not None and prompts_file is not None:
        raise UsageError("--receipt is for one prompt", hint="leave --prompts-file out")
    if options["receipt_file"] is not None:
        need_packages()
    check_writable(options["receipt_file"])
    check_writable(options["trace"])
    if options["threads"] is not None:
        set_threads(options["threads"])
    if options["numerics"] == "float":
        tiling = _tiling(options["tiles"])
        if tiling == "auto":
            raise UsageError("--numerics float does not measure tiles", hint="for example --tiles 4,32")
        return generate_float(model, prompts, options, tiling, single=prompts_file is None, as_json=as_json)
    refuse_given(CHECK_OPTIONS, "only --numerics float has tolerances")
    path = resolve_model(model)
    params = SamplingParams(
        temperature=options["temperature"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        min_p=options["min_p"],
        repetition_penalty=options["repetition_penalty"],
        presence_penalty=options["presence_penalty"],
        frequency_penalty=options["frequency_penalty"],
        seed=options["seed"],
    )
    config = _engine_config(model, path, options)
    run = _Run(model, path, config, single=prompts_file is None, as_json=as_json, receipt=options["receipt_file"])
    return run(prompts, params, options)


def _body(text: str, options: dict[str, Any]) -> dict[str, Any]:
    """What is asked, as a request to the server would say it. Raises: UsageError."""
    system = options["system"]
    if options["raw"]:
        if system is not None:
            raise UsageError("--system has no place in a --raw prompt", hint="write it into the prompt")
        return {"prompt": text}
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*messages, {"role": "user", "content": text}]}


def _prompts(prompt: str | None, file: Path | None, *, raw: bool) -> list[str]:
    """The prompts asked for. Raises: UsageError (none, or both kinds, or an empty one); ModelError (unreadable file)."""
    if (prompt is None) == (file is None):
        raise UsageError(
            "give either a prompt or --prompts-file", hint='for example: veriattn generate -m MODEL "Hello"'
        )
    if file is None:
        text = _standard_input() if prompt == "-" else prompt or ""
        if not (text if raw else text.strip()):
            raise UsageError("the prompt is empty", hint="give at least one token of text")
        return [text]
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_PROMPTS_BYTES + 1)
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}", hint="--prompts-file names a text file") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error
    if len(data) > _MAX_PROMPTS_BYTES:
        raise ModelError(f"{file} is larger than {_MAX_PROMPTS_BYTES} bytes", hint="split it")
    prompts = [_line(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UsageError(f"{file} has no prompts", hint="one a line: a JSON string or plain text")
    return prompts


def _line(file: Path, number: int, line: str) -> str:
    if not line.lstrip().startswith('"'):
        return line
    try:
        text = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{file}, line {number} begins like a JSON string and is none: {error}") from error
    if not isinstance(text, str) or not text:
        raise UsageError(f"{file}, line {number} is an empty prompt", hint="leave the line out")
    return text


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read(_MAX_PROMPTS_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text (byte {error.start})") from error


def _engine_config(model: str, path: Path, options: dict[str, Any]) -> EngineConfig:
    digest: str | None = options["digest"]
    if digest is None and model in PUBLISHED and path == models_directory() / model:
        digest = PUBLISHED[model].model_digest
    strategy: Strategy = options["strategy"]
    if strategy not in get_args(Strategy):
        raise UsageError(f"unknown strategy {strategy!r}")
    link = options["emulate_link"]
    return EngineConfig(
        strategy=strategy,
        prefill_chunk=options["prefill_chunk"],
        attention_check=_CHECKS[options["attention_check"]],
        tiling=_tiling(options["tiles"]),
        prover_kv_tokens=options["prover_kv_tokens"],
        prover_kv_total=options["prover_kv_total"],
        offload_ratio=options["offload_ratio"],
        tee_memory_bytes=None if options["tee_memory"] is None else _size(options["tee_memory"]),
        kv_shield=options["kv_shield"],
        shield_first_layers=options["shield_first_layers"],
        emulate_link=None if link is None else Throttle.parse(link),
        device=_device(options["device"]),
        prover_command=prover_words(options["prover_command"]),
        prover_address=options["prover_address"],
        prover_threads=options["threads"] if options["prover_address"] is None else None,
        trace=options["trace"],
        expected_digest=digest,
    )


def _device(name: str) -> str:
    """A device of the exact prover. Raises: UsageError."""
    if name not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {name}: the exact prover runs on cpu or cuda", hint="CUDA_VISIBLE_DEVICES picks a GPU"
        )
    return name


def _size(text: str) -> int:
    """Bytes in a size such as 512M. Raises: UsageError."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit)
    if scale is None or not (digits.isascii() and digits.isdigit()):
        raise UsageError(f"--tee-memory {text!r} is not a size", hint="for example 512M or 4G")
    return int(digits) * scale


def _tiling(text: str | None) -> Tiling | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text == "off":
        return Tiling(1, 1, pipeline=False)
    heads, _, rows = text.partition(",")
    if not (heads.isascii() and heads.isdigit() and rows.isascii() and rows.isdigit() and int(heads) and int(rows)):
        raise UsageError(f"--tiles {text!r} is neither HEADS,ROWS nor auto nor off", hint="for example --tiles 4,32")
    return Tiling(int(heads), int(rows))


class _Run:
    """One invocation: loads, submits, streams, and accounts for it even when it ends early."""

    def __init__(
        self, model: str, path: Path, config: EngineConfig, *, single: bool, as_json: bool, receipt: Path | None
    ) -> None:
        self._receipt = receipt
        self._body: dict[str, Any] = {}
        self._name, self._path, self._config, self._single, self._as_json = model, path, config, single, as_json
        self._mark = UNVERIFIED_MARK if config.strategy == "dangerous-unverified" else ""
        self._stream = TextStream(self._mark, to_stderr=as_json)
        self._states: list[RequestState] = []
        self._logprobs: dict[int, list[dict[str, Any]]] = {}
        self._load_s = 0.0

    def __call__(self, prompts: list[str], params: SamplingParams, options: dict[str, Any]) -> int:
        """Exit code. Raises: VeriattnError where nothing at all was released."""
        began = time.monotonic()
        progress = Progress()
        try:
            size = (self._path / WEIGHTS_FILE).stat().st_size if (self._path / WEIGHTS_FILE).is_file() else 0
            on_bytes = progress.bytes_of("reading and hashing the model", size)
            engine = Engine(self._path, self._config, on_bytes=on_bytes)
            ids = [engine.submit(self._request(engine, text, params, options)) for text in prompts]
            self._states = [engine.states[i] for i in ids]
            self._body = _body(prompts[0], options)
            if self._config.strategy != "full-tee":
                progress("starting the prover", 0, 0)
            self._start(engine)
        finally:
            progress.close()
        self._load_s = time.monotonic() - began
        try:
            with engine:
                self._drive(engine, ids)
                return self._finish(engine, None)
        except KeyboardInterrupt:
            # A second Ctrl-C must not cut the account of the first short.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return self._finish(engine, Interrupted("interrupted"))
        except VeriattnError as error:
            return self._finish(engine, error)

    @staticmethod
    def _start(engine: Engine) -> None:
        """Open the session before the clock of the first token runs."""
        engine.start()
        for state in engine.states.values():
            state.timing.submitted = time.monotonic()

    @staticmethod
    def _request(engine: Engine, text: str, params: SamplingParams, options: dict[str, Any]) -> Request:
        codec, body = engine.codec, _body(text, options)
        prompt_ids = codec.encode_chat(body["messages"]) if "messages" in body else codec.encode(text)
        return Request(
            prompt_ids=tuple(prompt_ids),
            params=params,
            max_tokens=options["max_tokens"],
            stop=tuple(options["stop"]),
            logprobs=options["logprobs"],
        )

    def _drive(self, engine: Engine, ids: list[int]) -> None:
        shown = 0
        while engine.has_work:
            for out in engine.step():
                self._note_logprobs(engine, out)
                if self._single:
                    self._stream.write(out.text)
            # Several answers grow at once: each is shown when it and all before it are complete.
            while not self._single and shown < len(ids) and self._states[shown].finish_reason is not None:
                self._show_whole(shown)
                shown += 1
        self._stream.end()

    def _show_whole(self, index: int) -> None:
        self._stream.write(f"--- {index + 1}\n{self._states[index].text}")
        self._stream.end()

    def _note_logprobs(self, engine: Engine, out: TokenOutput) -> None:
        if out.logprob is None or out.token_id is None:
            return
        entry = {"token_id": out.token_id, "token": engine.codec.token(out.token_id), "logprob": out.logprob}
        top = [{"token_id": i, "token": engine.codec.token(i), "logprob": p} for i, p in out.top_logprobs]
        self._logprobs.setdefault(out.request_id, []).append({**entry, "top": top})

    def _finish(self, engine: Engine, error: VeriattnError | None) -> int:
        """Print the account; the exit code."""
        self._stream.end()
        engine.close()
        interrupted = isinstance(error, Interrupted)
        for state in self._states:
            engine.cancel(state.sequence.seq_id)
            if not self._single and interrupted and state.text and state.finish_reason == "cancelled":
                self._show_whole(self._states.index(state))
        data = generation_json(
            engine, self._states, name=self._name, load_s=self._load_s, logprobs=self._logprobs, single=self._single
        )
        if error is not None:
            print_error(error)
        if error is None and self._receipt is not None:
            write_local_receipt(self._receipt, engine, self._states[0], self._body)
        released = sum(len(s.output_ids) for s in self._states)
        if error is None or interrupted or released:
            note(f"{self._mark}{in_words(data, released)}")
        if engine.trace_summary is not None:
            emulated = " (emulated link)" if self._config.emulate_link is not None else ""
            note(f"{self._mark}trace in {self._config.trace}{emulated}\n{table(engine.trace_summary)}")
        if self._as_json:
            if error is None:
                print_json(data)
            elif interrupted:
                print_json({**data, "error": error_json(error)})
            else:
                # At the top nothing may look like a finished, verified answer.
                partial = {key: data[key] for key in ("text", "token_ids", "results") if key in data}
                print_json(
                    {
                        "error": error_json(error),
                        "verified": False,
                        "partial": {**partial, "verified": data["verified"]},
                    }
                )
        return 0 if error is None else error.exit_code
