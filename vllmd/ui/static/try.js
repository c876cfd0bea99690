// Try: ask one model, or two side by side; embeddings and rerank; and the same as a command.

import { html } from "./html.js";
import { useRef, useState } from "./vendor/hooks.js";
import { send, splitLines } from "./api.js";
import { seconds } from "./format.js";
import { useLive } from "./live.js";
import { Command, Empty, ModelPick, Problem } from "./parts.js";

const LARGEST_IMAGE = 8 << 20, LARGEST_SOUND = 25 << 20; // bytes
const WHAT = { chat: "chat", embeddings: "embeddings", rerank: "rerank", images: "an image", speech: "speech", transcription: "a transcription" };

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
  const [sound, setSound] = useState(null);
  const [temperature, setTemperature] = useState("");
  const [most, setMost] = useState("");
  const [answers, setAnswers] = useState([]);
  const running = useRef(null);
  if (status && names.length === 0) return html`<${Empty} title="There is no model to try"><p><${Command} text=${'vllmctl run smollm2 "Hello!"'} /></p></${Empty}>`;

  const chosen = [first || names[0], how === "chat" ? second : ""].filter(Boolean);
  const bodyFor = (model) => bodyOf(how, { model, system, prompt, documents, image, sound, temperature, most });
  const ask = async (event) => {
    event.preventDefault();
    running.current?.abort();
    const stop = (running.current = new AbortController());
    setAnswers(chosen.map((model) => ({ model, text: "", state: "waiting" })));
    await Promise.all(chosen.map((model, at) => answer(PATHS[how], bodyFor(model), key, stop.signal, (change) =>
      setAnswers((before) => before.map((each, number) => (number === at ? { ...each, ...change } : each))))));
  };
  const busy = answers.some((each) => each.state === "waiting" || each.state === "streaming");
  return html`<h2>Try a model</h2>
    <form onSubmit=${ask} class="try">
      <div class="filters">
        <label>What <select value=${how} onChange=${(event) => setHow(event.target.value)}>${Object.entries(WHAT).map(([id, title]) => html`<option value=${id}>${title}</option>`)}</select></label>
        <${ModelPick} label="Model" names=${names} value=${first || names[0] || ""} onPick=${setFirst} />
        ${how === "chat" && html`<${ModelPick} label="Beside it" names=${names} value=${second} none="none" onPick=${setSecond} />`}
        <label>API key <input type="password" autocomplete="off" value=${key} placeholder="only where keys are set" onInput=${(event) => setKey(event.target.value)} /></label></div>
      ${how === "chat" && html`<details><summary>System prompt, parameters, image</summary>
        <label class="block">System prompt <textarea rows="2" value=${system} onInput=${(event) => setSystem(event.target.value)}></textarea></label>
        <div class="filters"><label>Temperature <input type="number" min="0" max="2" step="0.1" value=${temperature} onInput=${(event) => setTemperature(event.target.value)} /></label>
          <label>Most tokens <input type="number" min="1" value=${most} onInput=${(event) => setMost(event.target.value)} /></label>
          <label>Image <input type="file" accept="image/*" onChange=${async (event) => setImage(await imageOf(event.target))} /></label></div></details>`}
      ${how === "transcription" && html`<label class="block">Sound <input type="file" accept="audio/*" required onChange=${(event) => setSound(soundOf(event.target))} /></label>`}
      <label class="block">${{ rerank: "Query", chat: "Message", transcription: "What it is about, if you like" }[how] || "Text"}
        <textarea rows="3" required=${how !== "transcription"} value=${prompt} onInput=${(event) => setPrompt(event.target.value)}
          onKeyDown=${(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form.requestSubmit()}></textarea></label>
      ${how === "rerank" && html`<label class="block">Documents, one a line <textarea rows="4" required value=${documents} onInput=${(event) => setDocuments(event.target.value)}></textarea></label>`}
      <div class="buttons"><button type="button" disabled=${!busy} onClick=${() => running.current?.abort()}>Stop</button><button type="submit" class="primary">Send</button></div>
    </form>
    <div class="answers" aria-live="polite">${answers.map((each) => html`<article key=${each.model} aria-label=${`answer of ${each.model}`}><h3>${each.model}</h3>
      ${each.state === "waiting" && html`<p class="soft">waiting; a model that is not loaded is loaded first</p>`}
      <div class="answer">${each.text}</div>${(each.images || []).map((source) => html`<img src=${source} alt=${`made by ${each.model}`} />`)}${each.audio && html`<audio controls src=${each.audio}></audio>`}<${Problem} error=${each.error} />
      ${each.firstByte !== undefined && html`<p class="soft">first word after ${seconds(each.firstByte)}${each.total ? `, ${seconds(each.total)} in all` : ""}${each.tokens ? `, ${each.tokens} tokens` : ""}</p>`}</article>`)}</div>
    ${(prompt || sound) && html`<details><summary>The same as a command</summary>
      <h3>curl</h3><pre>${asCurl(PATHS[how], bodyFor(chosen[0]), Boolean(key))}</pre>
      <h3>Python</h3><pre>${asPython(how, bodyFor(chosen[0]), Boolean(key))}</pre></details>`}`;
}

const PATHS = { chat: "/v1/chat/completions", embeddings: "/v1/embeddings", rerank: "/v1/rerank", images: "/v1/images/generations", speech: "/v1/audio/speech", transcription: "/v1/audio/transcriptions" };

export function bodyOf(how, { model, system, prompt, documents, image, sound, temperature, most }) {
  if (how === "embeddings") return { model, input: prompt };
  if (how === "images") return { model, prompt, response_format: "b64_json" };
  if (how === "speech") return { model, input: prompt, voice: "alloy" };
  if (how === "transcription") return { model, file: sound, ...(prompt && { prompt }) };
  if (how === "rerank") return { model, query: prompt, documents: documents.split("\n").filter((line) => line.trim()) };
  const content = image ? [{ type: "text", text: prompt }, { type: "image_url", image_url: { url: image } }] : prompt;
  const body = { model, messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content }], stream: true };
  if (temperature !== "") body.temperature = Number(temperature);
  if (most !== "") body.max_tokens = Number(most);
  return body;
}

function soundOf(input) {
  const file = input.files[0];
  input.setCustomValidity(file && file.size > LARGEST_SOUND ? "at most 25 MiB" : "");
  return file && input.reportValidity() ? file : null;
}

/** A body with a file in it goes as a form. */
function sent(body) {
  if (!("file" in body)) return { headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, value);
  return { headers: {}, body: form };
}

/** What is shown of an answer that is no stream. */
async function whole(response) {
  if ((response.headers.get("content-type") || "").startsWith("audio/")) return { text: "", audio: URL.createObjectURL(await response.blob()) };
  const told = await response.json();
  const images = (told.data || []).filter((each) => each.b64_json).map((each) => `data:image/png;base64,${each.b64_json}`);
  return images.length ? { text: "", images } : { text: typeof told.text === "string" ? told.text : JSON.stringify(shortened(told), null, 2) };
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
  const { headers, body: data } = sent(body);
  if (key) headers.authorization = `Bearer ${key}`;
  try {
    const response = await send("POST", path, { headers, body: data, signal, credentials: "omit" });
    if (!body.stream) {
      tell({ state: "done", firstByte: passed(), ...(await whole(response)) });
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
  if ("file" in body) return `curl ${location.origin}${path}${keyed ? ' \\\n  -H "Authorization: Bearer $VLLMD_API_KEY"' : ""} \\\n  -F ${quoted(`model=${body.model}`)} -F ${quoted(`file=@${body.file?.name || "FILE"}`)}`;
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $VLLMD_API_KEY"` : "";
  return `curl ${location.origin}${path} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body))}`;
}

const PYTHON = {
  chat: ["chat.completions.create", "answer.choices[0].message.content"], embeddings: ["embeddings.create", "answer.data[0].embedding"],
  images: ["images.generate", "answer.data[0].b64_json"], speech: ["audio.speech.create", "answer.read()"], transcription: ["audio.transcriptions.create", "answer.text"],
}; // prettier-ignore

export function asPython(how, body, keyed) {
  const { stream, ...rest } = body;
  // Texts stay as they are: only outside of them is a word a value.
  const literal = (value) => JSON.stringify(value).replace(/"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b/g, (each) => ({ true: "True", false: "False", null: "None" })[each] ?? each);
  const args = Object.entries(rest).map(([name, value]) => `    ${name}=${name === "file" ? `open(${JSON.stringify(value?.name || "FILE")}, "rb")` : literal(value)},`).join("\n");
  const [method, shown] = PYTHON[how] || ["post", "answer"];
  const key = keyed ? 'os.environ["VLLMD_API_KEY"]' : '"none"';
  return `${keyed ? "import os\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=${key})\nanswer = client.${method}(\n${how in PYTHON ? args : `    "/rerank", body=${literal(rest)}, cast_to=object,`}\n)\nprint(${shown})`;
}
