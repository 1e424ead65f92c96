// A chat over the server's own API. Everything that came over the wire is shown with textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const history = [];
let model = null;
let busy = null;

const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
const freshNonce = () => hex(crypto.getRandomValues(new Uint8Array(32)));
const short = (text) => (text && text.length > 26 ? text.slice(0, 14) + "…" + text.slice(-8) : text || "–");
const number = (value) => value.toLocaleString("en-US");

function headers(extra) {
  const key = $("api-key").value.trim();
  return Object.assign({}, extra, key ? { Authorization: "Bearer " + key } : {});
}

function put(id, text, title) {
  $(id).textContent = text;
  if (title) $(id).title = title;
}

function badge(id, text, kind) {
  const el = $(id);
  el.textContent = text;
  el.className = "badge" + (kind ? " " + kind : "");
  el.hidden = false;
}

function element(tag, text, className) {
  const el = document.createElement(tag);
  if (text !== undefined) el.textContent = text;
  if (className) el.className = className;
  return el;
}

// -- state of the server ---------------------------------------------------------------------------------------

async function refreshState() {
  try {
    const state = await (await fetch("ready")).json();
    badge("badge-ready", state.ready ? "ready" : state.state, state.ready ? "good" : "bad");
    const caught = state.tamper_canary === "caught";
    const canary = state.tamper_canary === "not-applicable" ? "nothing outsourced" : "tamper canary " + state.tamper_canary;
    badge("badge-canary", canary, caught ? "good" : "");
    put("digest", short(state.model_digest), state.model_digest);
    put("strategy", state.strategy + " (" + state.guarantee + ")");
  } catch (e) {
    badge("badge-ready", "no connection", "bad");
  }
}

async function refreshModel() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) {
    $("key-box").open = true;
    return;
  }
  const entry = (await answer.json()).data[0];
  model = entry.id;
  put("model", entry.id);
  $("lie-label").hidden = !entry.veriattn.demo;
}

async function refreshAttestation() {
  const nonce = freshNonce();
  const answer = await fetch("v1/aci/attestation?nonce=" + nonce);
  if (!answer.ok) {
    put("tee", answer.status === 404 ? "no receipts here" : "no report to be had");
    return;
  }
  const report = await answer.json();
  const tee = report.attestation.tee_type;
  put("tee", tee === "test" ? "none (test provider)" : tee);
  put("keyset", short(report.workload_keyset_digest), report.workload_keyset_digest);
  put("nonce", report.nonce === nonce ? "fresh, echoed" : "NOT OURS", nonce);
  badge("badge-tee", tee === "test" ? "no TEE: test attestation" : tee + " report (not verified by this page)", "");
}

// -- an answer -------------------------------------------------------------------------------------------------

class Answer {
  constructor() {
    this.box = element("div", "", "message assistant");
    this.waiting = element("span", "waiting for the first checked token …", "waiting");
    this.box.append(this.waiting);
    $("messages").append(this.box);
    this.text = "";
    this.tokens = 0;
    this.first = null;
    this.lags = 0;
  }

  token(text, trace) {
    this.waiting.remove();
    const now = performance.now();
    this.first = this.first || now;
    this.tokens += 1;
    this.text += text;
    const span = element("span", text, trace.checked ? "tok" : "tok unchecked");
    span.title = (trace.checked ? "checked" : "computed inside") + ", id " + trace.token_id + ", lag " + trace.verification_lag_ms + " ms";
    this.box.append(span);
    this.lags += trace.verification_lag_ms;
    put("tokens", number(this.tokens));
    const seconds = (now - this.first) / 1000;
    if (this.tokens > 1) put("rate", ((this.tokens - 1) / seconds).toFixed(1));
    put("lag", trace.verification_lag_ms.toFixed(1) + " ms (mean " + (this.lags / this.tokens).toFixed(1) + ")");
    put("linear", number(trace.checks.linear_rows || 0));
    put("attention", number(trace.checks.attention_rows || 0));
    $("messages").scrollTop = $("messages").scrollHeight;
  }

  fail(error) {
    this.waiting.remove();
    if (!this.text) this.box.remove();
    const caught = /mismatch|malformed|verification/.test(error.code || "");
    const card = element("div", undefined, "rejection");
    card.setAttribute("role", "alert");
    card.append(element("h3", caught ? "Rejected: the prover was caught" : "No answer"));
    card.append(element("p", error.message, "reason"));
    const place = /layers\.(\d+)\.(\w+)/.exec(error.message || "");
    if (caught) {
      const list = element("dl");
      const rows = [["check", error.code], ["layer", place ? place[1] : "–"], ["operation", place ? place[2] : (/lm_head/.exec(error.message) || ["–"])[0]]];
      rows.push(["tokens shown before", this.tokens + ", all of them checked"]);
      for (const [name, value] of rows) list.append(element("dt", name), element("dd", String(value)));
      card.append(list);
      card.append(element("p", "Nothing that depends on the lie was sent. The prover is being replaced."));
    }
    $("messages").append(card);
    $("messages").scrollTop = $("messages").scrollHeight;
  }
}

async function* events(body) {
  // Raw bytes first, for the hash in the receipt, then the events that they complete.
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield { bytes: value };
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      yield data === "[DONE]" ? { end: true } : { object: JSON.parse(data) };
    }
  }
}

async function ask(prompt) {
  history.push({ role: "user", content: prompt });
  $("empty")?.remove();
  $("messages").append(element("div", prompt, "message user"));
  const answer = new Answer();
  $("receipt").replaceChildren(element("p", "Issued when the answer has ended in good order.", "quiet"));
  const nonce = freshNonce();
  const request = JSON.stringify({
    model,
    messages: history,
    stream: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    veriattn: { events: true, lie: $("lie").checked },
    ignore_eos: $("lie").checked,  // the lie comes after a few tokens; an answer must not end before it
  });
  $("lie").checked = false;
  busy = new AbortController();
  let ended = false;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json", "X-ACI-Nonce": nonce }),
      body: request,
      signal: busy.signal,
    });
    if (!response.ok) {
      answer.fail((await response.json()).error);
      return;
    }
    const received = [];
    for await (const event of events(response.body)) {
      if (event.bytes) received.push(event.bytes);
      else if (event.end) ended = true;
      else if (event.object.error) answer.fail(event.object.error);
      else if (event.object.veriattn) answer.token(event.object.choices[0].delta.content || "", event.object.veriattn);
    }
    if (ended) await showReceipt(response.headers.get("X-Receipt-Id"), request, received, nonce);
  } catch (e) {
    if (e.name !== "AbortError") answer.fail({ message: String(e.message || e) });
  } finally {
    busy = null;
    if (answer.text && ended) history.push({ role: "assistant", content: answer.text });
    else history.pop();
    refreshState();
  }
}

// -- the receipt -----------------------------------------------------------------------------------------------

async function sha256(data) {
  // Browsers offer this on https and on localhost only.
  return crypto.subtle ? "sha256:" + hex(new Uint8Array(await crypto.subtle.digest("SHA-256", data))) : null;
}

async function showReceipt(id, request, received, nonce) {
  const box = $("receipt");
  box.replaceChildren();
  if (!id) {
    box.append(element("p", "This server issues none.", "quiet"));
    return;
  }
  const answer = await fetch("v1/aci/receipts/" + encodeURIComponent(id), { headers: headers() });
  const receipt = await answer.json();
  if (!answer.ok) {
    box.append(element("p", receipt.error.message, "no"));
    return;
  }
  const byType = Object.fromEntries(receipt.event_log.map((e) => [e.type, e]));
  const event = byType["gpu.verified"];
  const sent = await sha256(new TextEncoder().encode(request));
  const got = await sha256(new Uint8Array(await new Blob(received).arrayBuffer()));
  const list = element("dl");
  const row = (name, text, good) => list.append(element("dt", name), element("dd", text, good === undefined ? "" : good ? "ok" : "no"));
  const value = (name, text) => list.append(element("dt", name), element("dd", text, "mono"));
  value("id", short(receipt.receipt_id));
  row("result", event.result + ", 2^-" + event.soundness_bits, event.result === "verified");
  row("our request", sent === null ? "not checked (needs https)" : sent === byType["request.received"].body_hash ? "hash matches" : "HASH DIFFERS", sent === null ? undefined : sent === byType["request.received"].body_hash);
  row("what we received", got === null ? "not checked (needs https)" : got === byType["response.returned"].body_hash ? "hash matches" : "HASH DIFFERS", got === null ? undefined : got === byType["response.returned"].body_hash);
  row("our nonce", event.client_nonce === nonce ? "bound" : "NOT OURS", event.client_nonce === nonce);
  value("seed", event.sampling.seed);
  box.append(list);
  const details = element("details");
  details.append(element("summary", "whole receipt"), element("pre", JSON.stringify(receipt, null, 1)));
  box.append(details);
  box.append(element("p", "Signature and quote: check them with `veriattn receipt verify`.", "quiet"));
}

// -- controls --------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", async (e) => {
  e.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt || busy) return;
  if (!model) await refreshModel();
  if (!model) return;
  $("prompt").value = "";
  $("send").disabled = true;
  $("stop").hidden = false;
  await ask(prompt);
  $("send").disabled = false;
  $("stop").hidden = true;
  $("prompt").focus();
});

$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    $("ask").requestSubmit();
  }
});

$("stop").addEventListener("click", () => busy && busy.abort());
$("api-key").addEventListener("change", () => refreshModel());

refreshState();
refreshModel();
refreshAttestation();
setInterval(refreshState, 3000);
