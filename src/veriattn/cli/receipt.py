"""`receipt`: check a receipt and the attestation it rests on; recompute the answer; write one for `generate`."""

from __future__ import annotations

import datetime
import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veriattn.cli.inputs import check_digest, check_writable, threads_option
from veriattn.cli.output import json_option, note, print_json
from veriattn.errors import EXIT_OK, EXIT_VERIFICATION, AttestationError, UsageError
from veriattn.home import resolve_model
from veriattn.native import set_threads
from veriattn.spec.modelfile import read_manifest

if TYPE_CHECKING:
    from veriattn.attest.canonical import Json
    from veriattn.attest.policy import Policy
    from veriattn.attest.verify import Expectations, ReceiptVerifier, Step, Verification
    from veriattn.client.bundle import Bundle
    from veriattn.client.remote import Remote
    from veriattn.client.replay import Replay
    from veriattn.engine.engine import Engine, RequestState

_FILE = click.Path(path_type=Path, dir_okay=False)
_request = click.option("--request", "request_file", type=_FILE, metavar="FILE", help="Raw body of the request.")
_response = click.option("--response", "response_file", type=_FILE, metavar="FILE", help="Raw body of the response.")
_api_key = click.option(
    "--api-key", envvar="VERIATTN_API_KEY", metavar="KEY", help="For a URL.  [default: $VERIATTN_API_KEY]"
)
_ca = click.option("--ca", type=_FILE, metavar="FILE", help="For a URL: certificate authorities (PEM).")


@click.group(no_args_is_help=False)
def receipt() -> None:
    """Check what a server answered: by its receipt and attestation, or by computing it again.

    \b
    Example:
      veriattn receipt verify answer.json --policy policy.json -m smollm2
      veriattn receipt replay answer.json -m smollm2
    """


@receipt.command()
@click.argument("source")
@click.argument("ident", metavar="[ID]", required=False)
@click.option(
    "--policy", "policy_file", type=_FILE, metavar="FILE", help="What you accept: pinned measurements, models."
)
@click.option("-m", "--model", metavar="MODEL", help="Accept this local model's digest.")
@click.option("--model-digest", callback=check_digest, multiple=True, metavar="SHA256",
              help="Accept this model digest. May be repeated.")  # fmt: skip
@_request
@_response
@click.option("--nonce", metavar="HEX", help="The nonce that you sent with the request.")
@click.option("--attestation", "attestation_file", type=_FILE, metavar="FILE", help="The attestation report.")
@click.option("--attestation-nonce", metavar="HEX", help="The nonce that you asked for the report with.")
@click.option("--collateral", "collateral_file", type=_FILE, metavar="FILE", help="Intel's collateral, in JSON.")
@click.option("--fetch-collateral", is_flag=True, help="Fetch Intel's collateral.")
@click.option("--pccs", metavar="URL", help="Where to fetch it.  [default: Intel's own service]")
@click.option("--at", metavar="TIME", help="Check as of this time (Unix seconds or ISO 8601).  [default: now]")
@_api_key
@_ca
@click.option("--attested-tls", is_flag=True, help="For a URL: accept the TLS key that the quote vouches for.")
@click.option("--save", type=_FILE, metavar="FILE", help="Keep everything in one file, to be checked again offline.")
@json_option
def verify(source: str, ident: str | None, as_json: bool, **options: Any) -> int:
    """Check a receipt: every step PASS, FAIL or SKIP, with the reason. Exit code 0 only for VERIFIED.

    SOURCE is a file (a bundle, or a bare receipt with --request, --response and --attestation), or a server's URL with the
    ID of a receipt or a response. Nothing is fetched for a file unless --fetch-collateral says so. A step that cannot be
    taken is a SKIP, and a SKIP is never a pass: without a policy that pins measurements nothing is VERIFIED.

    \b
    Example:
      veriattn receipt verify answer.json --policy policy.json -m smollm2
      veriattn receipt verify https://host/v1 chatcmpl-123 --policy policy.json --model-digest 5e88... \\
        --request request.json --response response.json --nonce 0f3a...
    """
    need_packages()
    check_writable(options["save"])
    from veriattn.attest.quotes import production_verifiers  # noqa: PLC0415 - an extra
    from veriattn.attest.verify import Expectations, ReceiptVerifier  # noqa: PLC0415

    policy, now = _policy(options["policy_file"]), _time(options["at"])
    verifier = ReceiptVerifier(production_verifiers(policy))
    if options["attested_tls"]:
        options["certificate"] = _attested(source, verifier, Expectations(now, collateral=_given_collateral(options)))
    bundle, remote = _bundle(source, ident, options)
    if options["save"] is not None:
        bundle.save(options["save"])
    # A key set that names TLS keys says that connections end inside the TEE: one without TLS does not.
    spki = None if remote is None else remote.tls_spki_sha256 or "no TLS"
    expect = Expectations(
        now=now,
        request=bundle.request,
        response=bundle.response,
        client_nonce=bundle.client_nonce,
        attestation_nonce=bundle.attestation_nonce,
        model_digests=(*policy.model_digests, *_digests(options)),
        min_soundness_bits=policy.min_soundness_bits,
        collateral=_collateral(bundle, options),
        tls_spki_sha256=spki,
    )
    found = verifier.verify(bundle.receipt, bundle.attestation, expect)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found.steps)
        _show_rest(found)
    return EXIT_OK if found.verdict == "VERIFIED" else EXIT_VERIFICATION


@receipt.command()
@click.argument("source")
@click.argument("ident", metavar="[ID]", required=False)
@click.option("-m", "--model", required=True, metavar="MODEL", help="Your own copy: a directory or a pulled name.")
@_request
@_response
@_api_key
@_ca
@threads_option
@json_option
def replay(source: str, ident: str | None, model: str, as_json: bool, threads: int | None, **options: Any) -> int:
    """Compute the answer again on this CPU and compare token ids. Trusts no TEE and no key, only your copy of the model.

    The answer's tokens are fed in one prefill and the canonical sampler is run at each position, so sampled answers can be
    replayed as well as greedy ones. SOURCE and ID are as for `receipt verify`. Exit code 0 only for a MATCH.

    \b
    Example:
      veriattn receipt replay answer.json -m smollm2
    """
    need_packages()
    from veriattn.client.replay import Replayer, ReplayModel  # noqa: PLC0415 - an extra

    bundle, _ = _bundle(source, ident, {**options, "offline": True})
    if bundle.request is None or bundle.response is None:
        raise UsageError(
            "a replay needs the raw bytes of request and response", hint="give a bundle, or --request and --response"
        )
    if threads is not None:
        set_threads(threads)
    began = time.monotonic()
    loaded = ReplayModel(resolve_model(model))
    load_s = time.monotonic() - began
    found = Replayer(loaded).replay(bundle.receipt, bundle.request, bundle.response)
    found.load_s = load_s
    if as_json:
        print_json(found.to_json())
    else:
        _show(found.steps)
        _show_cost(found)
    return EXIT_OK if found.matches else EXIT_VERIFICATION


def need_packages() -> None:
    """Raises: UsageError where the packages of receipts are not installed."""
    try:
        import cryptography  # noqa: F401, PLC0415 - an extra
        import rfc8785  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise UsageError(
            f"receipts need the package {error.name}, which is not installed", hint="pip install 'veriattn[attest]'"
        ) from None


def _policy(path: Path | None) -> Policy:
    from veriattn.attest.policy import Policy  # noqa: PLC0415 - an extra

    return Policy() if path is None else Policy.load(path)


def _digests(options: dict[str, Any]) -> list[str]:
    digests = list(options["model_digest"])
    if options["model"] is not None:
        digests.append(read_manifest(resolve_model(options["model"])).digest)
    return digests


def _bundle(source: str, ident: str | None, options: dict[str, Any]) -> tuple[Bundle, Remote | None]:
    """What the source and the options give together; options win over a bundle's contents."""
    from veriattn.attest.canonical import parse_object  # noqa: PLC0415 - an extra
    from veriattn.client.bundle import Bundle, read_file  # noqa: PLC0415

    remote = None
    if source.startswith(("http://", "https://")):
        bundle, remote = _fetch(source, ident, options)
    elif ident is not None:
        raise UsageError("an ID belongs to a URL", hint="name a file alone, or a URL and an ID")
    else:
        bundle = Bundle.load(Path(source))
    report = options.get("attestation_file")
    given = {
        "request": None if options["request_file"] is None else read_file(options["request_file"]),
        "response": None if options["response_file"] is None else read_file(options["response_file"]),
        "client_nonce": options.get("nonce"),
        "attestation": None if report is None else parse_object(read_file(report), str(report)),
        "attestation_nonce": options.get("attestation_nonce"),
    }
    fields = {**vars(bundle), **{k: v for k, v in given.items() if v is not None}}
    return Bundle(**fields), remote


def _fetch(url: str, ident: str | None, options: dict[str, Any]) -> tuple[Bundle, Remote | None]:
    from veriattn.client.bundle import Bundle  # noqa: PLC0415 - an extra
    from veriattn.client.remote import Remote  # noqa: PLC0415

    if ident is None:
        raise UsageError("a URL needs the ID of a receipt or a response")
    remote = Remote(url, options["api_key"], options["ca"], certificate_pem=options.get("certificate"))
    found = remote.receipt(ident)
    if options.get("offline") or options.get("attestation_file") is not None:
        return Bundle(found), None
    keyset = found.get("workload_keyset_digest")
    nonce = options.get("attestation_nonce") or secrets.token_hex(32)
    report = remote.attestation(nonce, keyset if isinstance(keyset, str) else None)
    return Bundle(found, report, attestation_nonce=nonce), remote if _tls_keys(report) else None


def _tls_keys(report: Json) -> bool:
    inner = report.get("attestation")
    keyset = inner.get("workload_keyset") if isinstance(inner, dict) else None
    return isinstance(keyset, dict) and bool(keyset.get("tls_public_keys"))


def _attested(source: str, verifier: ReceiptVerifier, expect: Expectations) -> str:
    from veriattn.client.tls import attested_certificate  # noqa: PLC0415 - an extra

    return attested_certificate(source, verifier, expect)


def _given_collateral(options: dict[str, Any]) -> str | None:
    from veriattn.client.bundle import read_file  # noqa: PLC0415 - an extra

    if options["collateral_file"] is None:
        return None
    try:
        return read_file(options["collateral_file"]).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{options['collateral_file']} is not text") from None


def _collateral(bundle: Bundle, options: dict[str, Any]) -> str | None:
    from veriattn.client.remote import fetch_collateral  # noqa: PLC0415 - an extra

    given = _given_collateral(options)
    if given is not None or not options["fetch_collateral"]:
        return given
    inner = (bundle.attestation or {}).get("attestation")
    evidence = inner.get("evidence") if isinstance(inner, dict) else None
    if not isinstance(evidence, dict):
        raise AttestationError("there is no attestation report to fetch collateral for")
    return fetch_collateral(evidence, options["pccs"])


def _time(text: str | None) -> int:
    if text is None:
        return int(time.time())
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--at {text!r} is neither Unix seconds nor ISO 8601") from None
    return int((at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).timestamp())


def _show(steps: list[Step]) -> None:
    width = max((len(s.name) for s in steps), default=0)
    for s in steps:
        click.echo(f"{s.status}  {s.name:<{width}}  {_printable(s.reason)}")


def _printable(text: str) -> str:
    # Reasons quote what a server sent; a terminal must not obey it.
    return "".join(c if c.isprintable() else "?" for c in text)


def _show_rest(found: Verification) -> None:
    for item in found.not_verified:
        click.echo(f"      not verified: {_printable(item)}")
    if found.tee_type == "test":
        click.echo("      provider `test`: no TEE attests this server; whoever runs it can have said anything")
    failed, skipped = len(found.failed()), len(found.skipped())
    counts = f"{len(found.steps) - failed - skipped} passed, {failed} failed, {skipped} skipped"
    click.echo(f"{found.verdict} ({counts})")


def _show_cost(found: Replay) -> None:
    timing = found.to_json()["timing"]
    if found.tokens_computed:
        click.echo(
            f"      {found.output_tokens} output tokens after {found.prompt_tokens} of prompt, {found.drafts} draft"
            f"{'' if found.drafts == 1 else 's'}: {found.compute_s:.2f} s, {timing['ms_per_output_token']:.1f} ms per "
            f"output token, {timing['ms_per_token']:.1f} ms per token computed (model read in {found.load_s:.1f} s)"
        )
    click.echo("MATCH" if found.matches else "MISMATCH")


# --- for `generate --receipt` ---------------------------------------------------------------------------------------


def write_local_receipt(path: Path, engine: Engine, state: RequestState, body: dict[str, Any]) -> None:
    """Issue a receipt for a finished local generation and save it as a bundle.

    body: what was asked, as the body of a request to `serve` would put it. The attestation is this machine's: `test`
    where there is no TEE. Raises: AttestationUnavailable, UsageError, ModelError.
    """
    need_packages()
    from veriattn.attest import receipts  # noqa: PLC0415 - an extra
    from veriattn.attest.providers import open_provider  # noqa: PLC0415
    from veriattn.attest.service import ReceiptService  # noqa: PLC0415
    from veriattn.client.bundle import Bundle  # noqa: PLC0415

    nonce, report = secrets.token_hex(32), engine.report()
    params, names = state.request.params, ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {n: getattr(params, n) for n in (*names, "presence_penalty", "frequency_penalty", "seed")}
    ending = {"max_tokens": state.request.max_tokens, "stop": list(state.request.stop)}
    asked = {**body, **sampling, **ending, "ignore_eos": state.request.ignore_eos}
    choice = {"index": 0, "finish_reason": state.finish_reason, "token_ids": list(state.output_ids)}
    text = {"message": {"role": "assistant", "content": state.text}} if "messages" in body else {"text": state.text}
    chat_id = "local-" + secrets.token_hex(16)
    request = json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()
    response = json.dumps({"id": chat_id, "choices": [{**choice, **text}]}, ensure_ascii=False, sort_keys=True).encode()
    event = receipts.verification_event(
        model_digest=engine.model.manifest.digest,
        strategy=engine.config.strategy,
        guarantee=engine.guarantee,
        checks=report.checks(),
        soundness_bits=report.soundness_bits,
        prompts=[state.request.prompt_ids],
        choices=[receipts.choice_json(0, state.output_ids, state.finish_reason or "")],
        sampling=receipts.sampling_json(
            state.request.params, state.sequence.max_tokens, ignore_eos=state.request.ignore_eos
        ),
        config={"strategy": engine.config.strategy, "prefill_chunk": engine.config.prefill_chunk},
        client_nonce=nonce,
    )
    service = ReceiptService(open_provider("auto"), subject="veriattn generate")
    issued = service.issue(request, response, event, "local", chat_id, endpoint="local")
    attestation_nonce = secrets.token_hex(32)
    attestation = service.attestation(attestation_nonce)
    Bundle(issued, attestation, request, response, nonce, attestation_nonce).save(path)
    where = "no TEE: provider `test`" if service.provider_name == "test" else service.provider_name
    note(f"receipt {issued['receipt_id']} written to {path} ({where})")
