// Try: ask one model, or two side by side; embeddings and rerank; and the same as a command.

import { html } from "./html.js";
import { useRef, useState } from "./vendor/hooks.js";
import { send, splitLines } from "./api.js";
import { seconds } from "./format.js";
import { useLive } from "./live.js";
import { Command, Empty, Problem } from "./parts.js";

const LARGEST_IMAGE = 8 << 20; // bytes

export function Try() {
  const { status } = useLive();
  const names = status?.models.map((line) => line.name) || [];
  const [how, setHow] = useState("chat");
  const [first, setFirst] = useState("");
  const [second, setSecond] = useState("");
  const [key, setKey] = useState("");
  const [system, setSystem] = useState("");
  const [prompt, setPrompt] = useState("");
  const [documents, setDocuments] = useState("");
  const [image, setImage] = useState(null);
  const [temperature, setTemperature] = useState("");
  const [most, setMost] = useState("");
  const [answers, setAnswers] = useState([]);
  const running = useRef(null);
  if (status && names.length === 0) return html`<${Empty} title="There is no model to try"><p><${Command} text=${'vllmctl run smollm2 "Hello!"'} /></p></${Empty}>`;

  const chosen = [first || names[0], how === "chat" ? second : ""].filter(Boolean);
  const bodyFor = (model) => bodyOf(how, { model, system, prompt, documents, image, temperature, most });
  const ask = async (event) => {
    event.preventDefault();
    running.current?.abort();
    const stop = (running.current = new AbortController());
    setAnswers(chosen.map((model) => ({ model, text: "", state: "waiting" })));
    await Promise.all(chosen.map((model, at) => answer(PATHS[how], bodyFor(model), key, stop.signal, (change) =>
      setAnswers((before) => before.map((each, number) => (number === at ? { ...each, ...change } : each))))));
  };
  const busy = answers.some((each) => each.state === "waiting" || each.state === "streaming");
  const options = (none) => html`${none && html`<option value="">${none}</option>`}${names.map((name) => html`<option value=${name}>${name}</option>`)}`;
  return html`<h2>Try a model</h2>
    <form onSubmit=${ask} class="try">
      <div class="filters">
        <label>What <select value=${how} onChange=${(event) => setHow(event.target.value)}><option value="chat">chat</option><option value="embeddings">embeddings</option><option value="rerank">rerank</option></select></label>
        <label>Model <select value=${first || names[0]} onChange=${(event) => setFirst(event.target.value)}>${options("")}</select></label>
        ${how === "chat" && html`<label>Beside it <select value=${second} onChange=${(event) => setSecond(event.target.value)}>${options("none")}</select></label>`}
        <label>API key <input type="password" autocomplete="off" value=${key} placeholder="only where keys are set" onInput=${(event) => setKey(event.target.value)} /></label></div>
      ${how === "chat" && html`<details><summary>System prompt, parameters, image</summary>
        <label class="block">System prompt <textarea rows="2" value=${system} onInput=${(event) => setSystem(event.target.value)}></textarea></label>
        <div class="filters"><label>Temperature <input type="number" min="0" max="2" step="0.1" value=${temperature} onInput=${(event) => setTemperature(event.target.value)} /></label>
          <label>Most tokens <input type="number" min="1" value=${most} onInput=${(event) => setMost(event.target.value)} /></label>
          <label>Image <input type="file" accept="image/*" onChange=${async (event) => setImage(await imageOf(event.target))} /></label></div></details>`}
      <label class="block">${how === "rerank" ? "Query" : how === "chat" ? "Message" : "Text"}
        <textarea rows="3" required value=${prompt} onInput=${(event) => setPrompt(event.target.value)}
          onKeyDown=${(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form.requestSubmit()}></textarea></label>
      ${how === "rerank" && html`<label class="block">Documents, one a line <textarea rows="4" required value=${documents} onInput=${(event) => setDocuments(event.target.value)}></textarea></label>`}
      <div class="buttons"><button type="button" disabled=${!busy} onClick=${() => running.current?.abort()}>Stop</button><button type="submit" class="primary">Send</button></div>
    </form>
    <div class="answers" aria-live="polite">${answers.map((each) => html`<article key=${each.model} aria-label=${`answer of ${each.model}`}><h3>${each.model}</h3>
      ${each.state === "waiting" && html`<p class="soft">waiting; a model that is not loaded is loaded first</p>`}
      <div class="answer">${each.text}</div><${Problem} error=${each.error} />
      ${each.firstByte !== undefined && html`<p class="soft">first word after ${seconds(each.firstByte)}${each.total ? `, ${seconds(each.total)} in all` : ""}${each.tokens ? `, ${each.tokens} tokens` : ""}</p>`}</article>`)}</div>
    ${prompt && html`<details><summary>The same as a command</summary>
      <h3>curl</h3><pre>${asCurl(PATHS[how], bodyFor(chosen[0]), Boolean(key))}</pre>
      ${how === "chat" && html`<h3>Python</h3><pre>${asPython(bodyFor(chosen[0]), Boolean(key))}</pre>`}</details>`}`;
}

const PATHS = { chat: "/v1/chat/completions", embeddings: "/v1/embeddings", rerank: "/v1/rerank" };

export function bodyOf(how, { model, system, prompt, documents, image, temperature, most }) {
  if (how === "embeddings") return { model, input: prompt };
  if (how === "rerank") return { model, query: prompt, documents: documents.split("\n").filter((line) => line.trim()) };
  const content = image ? [{ type: "text", text: prompt }, { type: "image_url", image_url: { url: image } }] : prompt;
  const body = { model, messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content }], stream: true };
  if (temperature !== "") body.temperature = Number(temperature);
  if (most !== "") body.max_tokens = Number(most);
  return body;
}

async function imageOf(input) {
  const file = input.files[0];
  input.setCustomValidity(file && file.size > LARGEST_IMAGE ? "at most 8 MiB" : "");
  if (!file || !input.reportValidity()) return null;
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(file);
  });
}

/** Ask, and tell every change of the answer. The key goes along; the page's session never does. */
async function answer(path, body, key, signal, tell) {
  const began = performance.now(), passed = () => (performance.now() - began) / 1000;
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  try {
    const response = await send("POST", path, { headers, body: JSON.stringify(body), signal, credentials: "omit" });
    if (!body.stream) {
      tell({ state: "done", text: JSON.stringify(shortened(await response.json()), null, 2), firstByte: passed() });
      return;
    }
    let text = "", firstByte, tokens;
    for await (const line of splitLines(response.body)) {
      if (!line.startsWith("data: {")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices?.[0]?.delta || {};
      const more = (delta.reasoning_content || "") + (delta.content || "");
      tokens = chunk.usage?.completion_tokens ?? tokens;
      if (more) {
        firstByte ??= passed();
        text += more;
        tell({ state: "streaming", text, firstByte });
      }
    }
    tell({ state: "done", text: text || "(an empty answer)", firstByte: firstByte ?? passed(), total: passed(), tokens });
  } catch (error) {
    tell(signal.aborted ? { state: "stopped" } : { state: "failed", error });
  }
}

/** Long vectors by their beginning and their length. */
function shortened(value) {
  if (Array.isArray(value)) return value.length > 12 && typeof value[0] === "number" ? [...value.slice(0, 6), `... ${value.length} numbers`] : value.map(shortened);
  return value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([name, each]) => [name, shortened(each)])) : value;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(path, body, keyed) {
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $VLLMD_API_KEY"` : "";
  return `curl ${location.origin}${path} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body))}`;
}

export function asPython(body, keyed) {
  const { stream, ...rest } = body;
  const literal = (value) => JSON.stringify(value).replace(/\b(true|false|null)\b(?=[,}\]]|$)/g, (word) => ({ true: "True", false: "False", null: "None" })[word]);
  const args = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},`).join("\n");
  const key = keyed ? 'os.environ["VLLMD_API_KEY"]' : '"none"';
  return `${keyed ? "import os\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=${key})\nanswer = client.chat.completions.create(\n${args}\n)\nprint(answer.choices[0].message.content)`;
}
