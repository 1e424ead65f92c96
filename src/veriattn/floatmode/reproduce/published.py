"""Published figures of proof systems for language models, with their sources: what they prove is much more than this."""

from __future__ import annotations

from typing import Any

#: Only what the named source states itself. Hardware, models and what is proved differ from row to row.
FIGURES: tuple[dict[str, Any], ...] = (
    {
        "system": "zkLLM", "model": "13B parameters", "unit": "one inference (forward pass)", "prover_s": 900.0, "bound": "<",
        "proof": "< 200 kB", "source": "Sun, Li, Zhang: zkLLM. CCS 2024, arXiv 2404.16109, abstract",
    },
    {
        "system": "zkGPT", "model": "GPT-2 (124M)", "unit": "one inference (forward pass)", "prover_s": 25.0, "bound": "<",
        "proof": None, "source": "zkGPT. IACR ePrint / USENIX Security 2025, abstract",
    },
    {
        "system": "NanoZK", "model": "GPT-2 scale", "unit": "proof (layerwise)", "prover_s": 43.0, "bound": "=",
        "proof": "6.9 kB, verified in 23 ms", "source": "Wang: NanoZK. arXiv 2603.18046, abstract",
    },
    {
        "system": "VeriAttn", "model": "LLaMA3-8B, 6k tokens", "unit": "prefill in 39 s, about two orders below zkLLM",
        "prover_s": 39.0, "bound": "~", "proof": None, "source": "arXiv 2606.16352, figures (read off)",
    },
)  # fmt: skip


def measure(_trials: int) -> dict[str, Any]:
    """The table."""
    return {"figures": list(FIGURES)}


def plot(data: dict[str, Any], figure: Any) -> None:
    """Seconds per forward pass, as published."""
    axes = figure.subplots()
    rows = data["figures"]
    axes.barh([f"{r['system']}, {r['model']}" for r in rows], [r["prover_s"] for r in rows], color="#b0b8c4")
    axes.set(xscale="log", xlabel="seconds, as published (different models and machines)")
