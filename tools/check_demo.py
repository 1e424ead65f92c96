"""The demo: pull SmolLM2, answer one prompt, and compare the token ids with the recorded ones. `--record` writes them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).resolve().parent.parent / "demo" / "expected.json"
MAX_TOKENS = 48


def veriattn(*arguments: str) -> dict[str, Any]:
    """Run a command of this checkout; its JSON. Progress and text pass through on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "veriattn", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    began = time.monotonic()
    recorded = json.loads(EXPECTED.read_text(encoding="utf-8"))
    pulled = veriattn("pull", "smollm2")
    print(f"\nprompt: {recorded['prompt']}\n", file=sys.stderr)
    answer = veriattn("generate", "-m", "smollm2", "--max-tokens", str(MAX_TOKENS), recorded["prompt"])
    if sys.argv[1:] == ["--record"]:
        recorded.update(model_digest=pulled["model_digest"], token_ids=answer["token_ids"], text=answer["text"])
        EXPECTED.write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0

    checks, prover = answer["checks"], answer["prover"]
    print(f"\nmodel      {answer['model']['digest']}")
    print(f"prover     process {prover['pid']} ({prover['device']}), untrusted")
    print(
        f"checked    {checks['linear_rows']} rows of linear layers, {checks['attention_rows']} of attention: equalities"
    )
    print(f"recomputed {checks['elementwise_replayed']} elementwise rows; the sampler; nothing else was believed")
    print(f"soundness  a wrong token is shown with probability at most 2^-{answer['soundness_bits']}")
    same = {
        "model digest": pulled["model_digest"] == recorded["model_digest"] == answer["model"]["digest"],
        "token ids": answer["token_ids"] == recorded["token_ids"],
        "verified": answer["verified"] is True and answer["guarantee"] == "exact",
    }
    for what, equal in same.items():
        print(
            f"{'ok  ' if equal else 'FAIL'}       {what} {'as recorded' if equal else 'differs from ' + str(EXPECTED)}"
        )
    print(f"{time.monotonic() - began:.1f} s for fetching, converting and answering")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
