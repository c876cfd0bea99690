// Models as files: what is being fetched, what is in the engines' cache and could be served, and having more of both.

import { html } from "./html.js";
import { useEffect, useState } from "./vendor/hooks.js";
import { call, lines } from "./api.js";
import { bytes, percent, seconds } from "./format.js";
import { refresh, useLive } from "./live.js";
import { Problem, useLoaded } from "./parts.js";

const PHASES = { waiting: "waits for its turn", looking: "asks where it is", downloading: "fetching", unpacking: "unpacking", done: "is here", failed: "failed" };

// What this page has asked for goes on when another view is looked at; and the download when the tab is closed.
const asked = new Map(); // name -> {line, error}
const watchers = new Set();
const say = (name, what) => (asked.set(name, { ...asked.get(name), ...what }), watchers.forEach((watcher) => watcher({})));

async function pull(model) {
  say(model, { line: { phase: "waiting" }, error: null });
  try {
    const body = { model, add: true, detach: true };
    for await (const text of lines("/admin/store/pull", { method: "POST", body, accept: "application/x-ndjson" })) {
      const line = JSON.parse(text);
      say(model, { line, error: line.error ? new Error(line.error.message) : null });
    }
  } catch (error) {
    say(model, { error });
  }
  refresh();
}

export function Store() {
  const { status } = useLive();
  const [, poke] = useState({});
  const [name, setName] = useState("");
  const [error, setError] = useState(null);
  useEffect(() => (watchers.add(poke), () => watchers.delete(poke)), []);
  const done = [...asked.values()].filter(({ line }) => line?.done).length;
  const cache = useLoaded((signal) => call("GET", "/admin/store", undefined, { signal }), [done, status.models.length]);
  const act = async (method, path, body) => {
    try {
      setError(null);
      await call(method, path, body);
      refresh();
      cache.again();
    } catch (failure) {
      setError(failure);
    }
  };
  const submit = (event) => {
    event.preventDefault();
    pull(name.trim());
    setName("");
  };
  const known = new Map(status.downloads.map((line) => [line.model, { line }]));
  for (const [model, own] of asked) known.set(model, own);
  const unserved = (cache.value?.cached || []).filter((each) => each.models.length === 0);
  return html`<section aria-labelledby="more"><h2 id="more">More models</h2>
    <form onSubmit=${submit} class="filters"><label>Name or repository <input value=${name} required placeholder="smollm2, or ORG/NAME" onInput=${(event) => setName(event.target.value)} /></label>
      <button type="submit" class="primary">Fetch and serve</button></form>
    <${Problem} error=${error || cache.error} />
    ${[...known].map(([model, own]) => html`<${Coming} key=${model} model=${model} ...${own} onStop=${() => act("DELETE", `/admin/store/downloads/${encodeURIComponent(own.line?.model || model)}`)} />`)}
    ${unserved.length > 0 && html`<h3>In the engines' cache, and not served</h3><table class="rows" aria-label="cache"><thead><tr><th scope="col">files</th><th scope="col" class="number">size</th><th scope="col"><span class="unseen">actions</span></th></tr></thead>
      <tbody>${unserved.map((one) => html`<${Cached} key=${one.path || one.name} one=${one} onAdd=${(called, settings) => act("PUT", `/admin/store/models/${encodeURIComponent(called)}`, settings)} />`)}</tbody></table>`}</section>`;
}

function Coming({ model, line, error, onStop }) {
  const under = line && !line.done && !["done", "failed"].includes(line.phase);
  const share = line?.total ? percent(line.completed, line.total) : null;
  const left = line?.rate && line.total ? `, ${seconds((line.total - line.completed) / line.rate)} left` : "";
  return html`<div class="coming" role="group" aria-label=${`download of ${model}`}><strong>${model}</strong> <span class="soft">${PHASES[line?.phase] || line?.phase || ""}
      ${under && line.total > 0 && html` ${bytes(line.completed)} of ${bytes(line.total)}${line.rate ? `, ${bytes(line.rate)}/s` : ""}${left}`}
      ${line?.done && !error && (line.added ? " and is served now" : "")}</span>
    ${under && html`<progress max="100" value=${share ?? undefined} aria-label=${`download of ${model}`}></progress> <button type="button" class="small" onClick=${onStop}>cancel</button>`}
    <${Problem} error=${error || (line?.phase === "failed" && line.error ? new Error(line.error.message || line.error) : null)} /></div>`;
}

/** As `vllmctl add` does it: by the repository's own name, a quantisation as NAME:TAG. */
export function settingsOf(one, tag) {
  if (tag) return [`${one.name}:${tag}`, { engine: "llama.cpp" }];
  if (one.path.endsWith(".gguf")) return [one.name.replace(/\.gguf$/, ""), { engine: "llama.cpp", model: one.path }];
  return [one.name, one.engine ? { engine: one.engine } : {}];
}

function Cached({ one, onAdd }) {
  const [tag, setTag] = useState(one.files[0] || "");
  return html`<tr><th scope="row">${one.name}</th><td class="number">${bytes(one.size)}</td><td class="verbs">
    ${one.files.length > 0 && html`<select aria-label=${`quantisation of ${one.name}`} value=${tag} onChange=${(event) => setTag(event.target.value)}>${one.files.map((each) => html`<option>${each}</option>`)}</select>`}
    <button type="button" class="small" aria-label=${`serve ${one.name}`} onClick=${() => onAdd(...settingsOf(one, tag))}>serve it</button></td></tr>`;
}
