// Requests: those under way and the last ones, each with where its time went; bodies where somebody switched that on.

import { html } from "./html.js";
import { useEffect, useState } from "./vendor/hooks.js";
import { call, events, maySee } from "./api.js";
import { bytes, clock, count, csvOf, plural, rate, save, seconds, speedsOf } from "./format.js";
import { useLive } from "./live.js";
import { Dialog, Empty, ModelPick, Problem, Rows, useLoaded } from "./parts.js";

const ROW = 41; // pixels
const KEPT = 1000; // rows
const COLUMNS = [["time"], ["model"], ["key", "wide"], ["client", "wide roomy"], ["status"], ["queue", "number wide"], ["load", "number wide"],
  ["first byte", "number wide"], ["in all", "number"], ["tokens", "number"], ["tokens/s", "number wide"]]; // prettier-ignore

export function Requests({ name, only = "" }) {
  const { status } = useLive();
  const [filter, setFilter] = useState({ model: only, key: "", status: "", failed: false });
  const [recording, setRecording] = useState(false);
  const [ending, setEnding] = useState(null); // a request under way, to be cancelled once that is confirmed
  const { rows, underWay, error } = useRequests(filter);
  const set = (field) => (event) => setFilter({ ...filter, [field]: event.target.type === "checkbox" ? event.target.checked : event.target.value });
  if (name) return html`<${One} id=${name} />`;
  return html`<section aria-labelledby="requests"><h2 id="requests">Requests</h2>
    <div class="filters">
      <${ModelPick} label="Model" names=${namesOf(status)} value=${filter.model} none="all" onPick=${(model) => setFilter({ ...filter, model })} />
      <label>Key <input type="search" value=${filter.key} onChange=${set("key")} placeholder="name, or - for none" /></label>
      <label>Status <select value=${filter.status} onChange=${set("status")}><option value="">all</option><option>2xx</option><option>4xx</option><option>429</option><option>5xx</option></select></label>
      <label class="check"><input type="checkbox" checked=${filter.failed} onChange=${set("failed")} /> only failed</label>
      <button type="button" disabled=${!rows.length} onClick=${() => save("vllmd-requests.csv", csvOf(rows.map(flat)))}>Export as CSV</button>
      ${maySee("admin") && html`<button type="button" onClick=${() => setRecording(true)}>Record bodies</button>`}</div>
    <${Problem} error=${error} />
    ${rows.length + underWay.length === 0 && !error
      ? html`<${Empty} title="No request yet"><p>The last requests stand here, with their times, as soon as there are some. The view <a href="#/try">Try</a> makes one.</p></${Empty}>`
      : html`<${Rows} items=${[...underWay, ...rows]} height=${ROW} columns=${COLUMNS} label="requests" render=${(entry) => html`<${Line} key=${entry.id + entry.number} entry=${entry} onCancel=${setEnding} />`} />`}
    </section>${ending && html`<${Cancel} entry=${ending} onClose=${() => setEnding(null)} />`}${recording && html`<${Recording} onClose=${() => setRecording(false)} />`}`;
}

/** A request as a row of a spreadsheet. */
const flat = ({ tokens, ...entry }) => ({ ...Object.fromEntries(Object.entries(entry).filter(([, value]) => typeof value !== "object" || value === null)),
  prompt_tokens: tokens?.prompt, cached_tokens: tokens?.cached, answer_tokens: tokens?.answer, answer_tokens_per_second: speedsOf({ tokens, ...entry }).answer }); // prettier-ignore

/** The last requests that a filter lets through, newest first, and what has come since. */
function useRequests(filter) {
  const [found, setFound] = useState({ rows: [], underWay: [], error: null });
  useEffect(() => {
    const stop = new AbortController();
    const query = queryOf(filter);
    setFound({ rows: [], underWay: [], error: null });
    const read = async () => {
      const answer = await call("GET", `/admin/requests?limit=200${query}`, undefined, { signal: stop.signal });
      const last = answer.requests.at(-1)?.number ?? 0; // what is older is kept as it was
      setFound((before) => ({ rows: [...answer.requests, ...before.rows.filter((entry) => entry.number < last)].slice(0, KEPT), underWay: answer.under_way, error: null }));
    };
    (async () => {
      try {
        await read();
        let fresh = []; // those of this frame: a hundred a second are drawn as often as the screen is
        const show = () => {
          const more = fresh.reverse(), ended = new Set(more.map((entry) => entry.id));
          fresh = [];
          setFound((before) => ({
            rows: [...more.filter((entry) => entry.number > (before.rows[0]?.number ?? 0)), ...before.rows].slice(0, KEPT), // the list may have told of it
            underWay: before.underWay.filter((each) => !ended.has(each.id)),
            error: null,
          }));
        };
        for await (const entry of events(`/admin/events/requests?${query.slice(1)}`, { signal: stop.signal }))
          if (fresh.push(entry) === 1) requestAnimationFrame(show);
      } catch (error) {
        if (!stop.signal.aborted) setFound((before) => ({ ...before, error }));
      }
    })();
    const again = setInterval(() => document.hidden || read().catch(() => {}), 5000); // those under way are told by no event
    return () => {
      clearInterval(again);
      stop.abort();
    };
  }, [JSON.stringify(filter)]);
  return found;
}

const namesOf = (status) => (status?.models || []).map((line) => line.name);

export function queryOf(filter) {
  const wanted = Object.entries(filter).filter(([, value]) => value !== "" && value !== false);
  return wanted.map(([name, value]) => `&${name}=${encodeURIComponent(value)}`).join("");
}

export function tokensOf(tokens) {
  if (!tokens) return "";
  return `${tokens.estimated ? "about " : ""}${count(tokens.prompt)} + ${count(tokens.answer)}`;
}

const isUnderWay = (entry) => entry.number === 0;
const statusOf = (entry) => (isUnderWay(entry) ? "under way" : entry.status === 499 ? "client left" : String(entry.status));
// As vllmd.records.ring.failed has it.
const failed = (entry) => !["", "ClientGone"].includes(entry.error || "") || (entry.status >= 400 && entry.status !== 499);

/** What it means to cancel a request, and then it is done. */
function Cancel({ entry, onClose }) {
  const [error, setError] = useState(null);
  const confirmed = async (event) => {
    event.preventDefault();
    try {
      await call("DELETE", `/admin/requests/${encodeURIComponent(entry.id)}`);
      onClose();
    } catch (refused) {
      setError(refused);
    }
  };
  return html`<${Dialog} title="cancel a request" onClose=${onClose}><form onSubmit=${confirmed}>
    <p class="preview">It is for ${entry.model}, of ${entry.client}${entry.key && ` with the key ${entry.key}`}, and goes on for ${seconds(entry.seconds)}.
      ${entry.status ? " Its answer has begun: it is broken off." : " Its client gets status 403 with the code request_cancelled."} The model stays loaded.</p>
    <${Problem} error=${error} /><div class="buttons"><button type="button" onClick=${onClose}>Let it go on</button><button type="submit" class="primary">Cancel the request</button></div></form></${Dialog}>`;
}

function Line({ entry, onCancel }) {
  return html`<tr class=${failed(entry) ? "failed" : ""}>
    <td class="nowrap"><a href=${`#/requests/${encodeURIComponent(entry.id)}`}>${clock(entry.at)}</a></td>
    <th scope="row">${entry.model || entry.path}</th><td class="wide">${entry.key || "-"}</td>
    <td class="wide roomy soft" title=${`${entry.client} ${entry.agent}`}>${entry.agent?.split(" ")[0] || entry.client}</td>
    <td>${failed(entry) ? html`<span class="bad-text" title=${entry.message}>${statusOf(entry)} ${entry.error}</span>` : statusOf(entry)}
      ${entry.retries > 0 && html` <span class="tag">${plural(entry.retries, "retry").replace("retrys", "retries")}</span>`}
      ${isUnderWay(entry) && maySee("admin") && html` <button type="button" class="small" aria-haspopup="dialog" aria-label=${`cancel request ${entry.id}`} onClick=${() => onCancel(entry)}>cancel</button>`}</td>
    <td class="number wide">${seconds(entry.queue_seconds)}</td><td class="number wide">${seconds(entry.load_seconds)}</td>
    <td class="number wide">${seconds(entry.first_byte_seconds)}</td><td class="number">${seconds(entry.seconds)}</td>
    <td class="number nowrap">${tokensOf(entry.tokens)}</td><td class="number wide">${rate(speedsOf(entry).answer)}</td></tr>`;
}

function One({ id }) {
  const { value: entry, error, again } = useLoaded((signal) => call("GET", `/admin/requests/${encodeURIComponent(id)}`, undefined, { signal }), [id]);
  const [ending, setEnding] = useState(false);
  const goesOn = Boolean(entry) && isUnderWay(entry);
  useEffect(() => {
    if (!goesOn) return;
    const timer = setInterval(() => document.hidden || again(), 2000);
    return () => clearInterval(timer);
  }, [goesOn]);
  if (error) return html`<${Problem} error=${error} /><p><a href="#/requests">All requests</a></p>`;
  if (!entry) return html`<p class="soft">Reading the request.</p>`;
  const facts = [
    ["came", clock(entry.at)], ["asked", `${entry.method} ${entry.path}`], ["model", entry.model], ["replica", entry.replica],
    ["key", entry.key || "none"], ["client", entry.client], ["user agent", entry.agent], ["answer", entry.stream ? "as a stream" : "whole"], ["status", statusOf(entry)], ["error", entry.message || entry.error],
    ["retries", entry.retries], ["tokens", entry.tokens && `${tokensOf(entry.tokens)}, ${count(entry.tokens.cached)} of the prompt from the cache`],
    ["tokens per second", speedsOf(entry).answer && `${rate(speedsOf(entry).answer)} of the answer${speedsOf(entry).prompt ? `, ${rate(speedsOf(entry).prompt)} of the prompt` : ""}`],
    ["received", bytes(entry.received)], ["sent", bytes(entry.sent)],
  ]; // prettier-ignore
  return html`<h2>Request ${entry.id}</h2><${Times} entry=${entry} />
    ${goesOn && maySee("admin") && html`<p><button type="button" aria-haspopup="dialog" onClick=${() => setEnding(true)}>Cancel this request</button></p>`}
    ${ending && html`<${Cancel} entry=${entry} onClose=${() => (setEnding(false), again())} />`}
    <dl class="facts">${facts.filter(([, value]) => value).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${String(value)}</dd></div>`)}</dl>
    <h3>Head</h3><pre>${entry.headers.map(([name, value]) => `${name}: ${value}`).join("\n")}</pre>
    ${entry.recorded ? html`<h3>Request body${entry.recorded.request_cut ? ", its beginning" : ""}</h3><pre>${entry.recorded.request}</pre>
        <h3>Answer${entry.recorded.answer_cut ? ", its beginning" : ""}</h3><pre>${entry.recorded.answer}</pre>`
      : goesOn ? html`<p class="soft">Bodies are shown when the request has ended.</p>`
      : html`<p class="soft">Its bodies were not recorded. ${maySee("admin") ? "“Record bodies” in the list of requests does that, for a time." : "An administrator can have that done."}</p>`}
    <p><a href="#/requests">All requests</a></p>`;
}

/** Where the time of a request went, as one bar. */
function Times({ entry }) {
  const whole = Math.max(entry.seconds, 0.001);
  const load = entry.load_seconds || 0, queue = entry.queue_seconds || 0;
  const first = entry.first_byte_seconds === null ? whole : Math.max(entry.first_byte_seconds - queue - load, 0);
  const parts = [["waited for its turn", queue, 30], ["waited while the model loaded", load, 265], ["until the first byte", first, 210],
    ["the rest of the answer", Math.max(whole - queue - load - first, 0), 140]].filter(([, amount]) => amount > 0); // prettier-ignore
  return html`<div class="bar" role="img" aria-label=${parts.map(([what, amount]) => `${what}: ${seconds(amount)}`).join("; ")}>
      ${parts.map(([what, amount, hue]) => html`<span key=${what} class="share" style=${{ width: `${(100 * amount) / whole}%`, "--hue": hue }} title=${`${what}: ${seconds(amount)}`}></span>`)}</div>
    <p class="soft">${parts.map(([what, amount]) => `${what} ${seconds(amount)}`).join(", ")}; ${seconds(entry.seconds)} ${isUnderWay(entry) ? "so far" : "in all"}</p>`;
}

function Recording({ onClose }) {
  const { status } = useLive();
  const { value, error, again } = useLoaded((signal) => call("GET", "/admin/recordings", undefined, { signal }), []);
  const [model, setModel] = useState("");
  const [key, setKey] = useState("");
  const [minutes, setMinutes] = useState(10);
  const [failure, setFailure] = useState(null);
  const act = async (method, path, body) => {
    try {
      await call(method, path, body);
      setFailure(null);
      again();
    } catch (refused) {
      setFailure(refused);
    }
  };
  const begin = (event) => {
    event.preventDefault();
    act("POST", "/admin/recordings", { ...(model && { model }), ...(key && { key }), seconds: 60 * minutes });
  };
  return html`<${Dialog} title="Record bodies" onClose=${onClose}>
    <p>What clients send and get is kept in memory for the time that you say, up to 64 KiB of each; images and what looks like a secret are cut out. Clients are told by the field <code>x-vllmd-recorded</code>.</p>
    <${Problem} error=${failure || error} />
    ${(value?.recordings || []).map((each) => html`<p key=${each.number}>${each.model || "all models"}, ${each.key || "all keys"}: ${seconds(each.seconds_left)} left
      <button type="button" class="small" onClick=${() => act("DELETE", `/admin/recordings?number=${each.number}`)}>end</button></p>`)}
    <form onSubmit=${begin}><div class="filters"><${ModelPick} label="Model" names=${namesOf(status)} value=${model} none="all" onPick=${setModel} />
      <label>Key <input value=${key} onInput=${(event) => setKey(event.target.value)} placeholder="all" /></label>
      <label>Minutes <input type="number" min="1" max="10080" value=${minutes} onInput=${(event) => setMinutes(Number(event.target.value))} /></label></div>
      <div class="buttons"><button type="button" onClick=${onClose}>Close</button><button type="submit" class="primary">Record</button></div></form></${Dialog}>`;
}
